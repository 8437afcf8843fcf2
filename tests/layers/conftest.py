"""What holds for all tests of the layers."""

from collections.abc import Iterator

import pytest

from norm_plugin import settings


@pytest.fixture(autouse=True)
def _native() -> Iterator[None]:
    """Bits are compared here, so the sums must be those of PyTorch."""
    with settings.override(backend="native", strict=False, compile=False):
        yield
