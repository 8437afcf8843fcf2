"""Every test here runs the native path, whatever the environment says."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from norm_plugin import dispatch, kernels, settings
from tests.spec.fake_kernels import FakeKernel, Install


@pytest.fixture(autouse=True)
def native_backend() -> Iterator[None]:
    with settings.override(backend="native", strict=False, compile=False):
        yield


@pytest.fixture
def nothing_seen_yet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No routes, no counts, nothing logged yet, and no interpreter that would run Triton on a CPU."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(dispatch, "_logged", set())
    dispatch.reset()
    yield
    dispatch.reset()


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Makes a kernel that of rmsnorm, on any device."""

    def install(kernel: FakeKernel | None) -> FakeKernel | None:
        monkeypatch.setattr(kernels, "unavailable", lambda device: "")
        monkeypatch.setattr(kernels, "find", lambda family, op: kernel if op == "rmsnorm" else None)
        return kernel

    return install
