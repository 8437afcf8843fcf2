"""Every test here asks the native path, whatever the environment says; those that take `backend` ask the kernels where
pytest was told --backend=triton, and then no others run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from norm_plugin import dispatch, kernels, settings
from tests.kernels.chosen import of_the_specification, skip_without_kernels
from tests.kernels.conftest import products_summed_in_fp32, repaired_interpreter  # noqa: F401 - what kernels need
from tests.kernels.twins import TRITON, on_kernels
from tests.spec.backend import NATIVE, Backend
from tests.spec.fake_kernels import FakeKernel, Install

HERE = Path(__file__).parent


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", [metafunc.config.getoption("backend")], indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("backend") == "native":
        return
    here = [item for item in items if HERE in item.path.parents]
    chosen = of_the_specification(here)
    skip_without_kernels(chosen)
    left_out = set(here) - set(chosen)
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """What a test makes its tensors with, and calls ops through."""
    if request.param == "native":
        yield NATIVE
        return
    with on_kernels():
        yield TRITON


@pytest.fixture(autouse=True)
def native_backend() -> Iterator[None]:
    with settings.override(backend="native", strict=False, compile=False):
        yield


@pytest.fixture
def nothing_seen_yet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No routes, no counts, nothing logged yet, and no interpreter that would run Triton on a CPU."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    dispatch.log_once.cache_clear()
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
