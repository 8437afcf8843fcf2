"""Every test here asks the native path, whatever the environment says."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from norm_plugin import settings


@pytest.fixture(autouse=True)
def native_backend() -> Iterator[None]:
    with settings.override(backend="native", strict=False, compile=False):
        yield
