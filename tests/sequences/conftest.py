"""Where the sequences run: on a GPU, in Triton's interpreter, or natively, as tests/kernels/device.py says."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.kernels import interpreter
from tests.kernels.conftest import products_summed_in_fp32  # noqa: F401 - layernorm_linear's product is torch's


@pytest.fixture(scope="session", autouse=True)
def repaired_interpreter() -> Iterator[None]:
    """Roundings to nearest even, and less time; interpreter.py says what is replaced."""
    with interpreter.repaired():
        yield
