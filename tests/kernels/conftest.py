"""Every test here runs on the kernels, on what device.py says, and strictly: what falls back to native fails."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from norm_plugin import dispatch, settings
from norm_plugin.accuracy import inputs
from norm_plugin.numerics import GATED_NUMERICS, NUMERICS
from tests.kernels import interpreter, twins
from tests.kernels.device import COMPILED, DEVICE, why_not
from tests.kernels.pairwise import pairwise
from tests.spec import samples

HERE = Path(__file__).parent
MOST_KEPT = 2**31  # bytes of GPU memory between tests: other processes test beside this one


@pytest.fixture(scope="session", autouse=True)
def repaired_interpreter() -> Iterator[None]:
    """Roundings to nearest even, and less time; interpreter.py says what is replaced."""
    with interpreter.repaired():
        yield


@pytest.fixture(scope="session", autouse=True)
def products_summed_in_fp32() -> None:
    """The product of layernorm_linear is cuBLAS's, which may otherwise add up parts of it in bf16 or fp16."""
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


@pytest.fixture(autouse=True)
def kernels_or_nothing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The Triton backend, tensors on its device, and the cases of the specification held against the native twins."""
    monkeypatch.setattr(samples, "DEVICE", DEVICE)
    monkeypatch.setattr(samples, "call", twins.call)
    monkeypatch.setattr(samples, "outputs", twins.outputs)
    for name in ("make", "weights", "biases"):
        monkeypatch.setattr(inputs, name, partial(getattr(inputs, name), device=DEVICE))
    with settings.override(backend="triton", strict=True, compile=False, pdl=None), np.errstate(all="ignore"):
        yield
    dispatch.reset()
    if COMPILED and torch.cuda.memory_reserved() > MOST_KEPT:
        torch.cuda.empty_cache()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "without_kernels: needs neither a GPU nor the interpreter")
    config.addinivalue_line("markers", "alone: run last by scripts/test_gpu, in one process: wants all of the GPU")


def of_torch_functions(item: pytest.Function) -> bool:
    """Whether the specification is asked in numerics of PyTorch's own functions, which no kernel computes."""
    numerics = item.callspec.params.get("numerics") if hasattr(item, "callspec") else None
    known = NUMERICS | GATED_NUMERICS
    return numerics in known and known[str(numerics)].torch_functions


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what cannot run here, and thin out the grids of the specification."""
    asked = [item for item in items if HERE in item.path.parents and isinstance(item, pytest.Function)]
    here = [item for item in asked if not of_torch_functions(item)]
    if refused := [item for item in asked if of_torch_functions(item)]:  # test_refusals.py shows that they are
        config.hook.pytest_deselected(items=list(refused))
        items[:] = [item for item in items if item not in set(refused)]
    for item in here:
        if item.get_closest_marker("without_kernels") is None and (reason := why_not()):
            item.add_marker(pytest.mark.skip(reason=reason))
    if os.environ.get("EVERY_KERNEL_TEST") == "1":
        return
    grids: dict[object, list[pytest.Function]] = {}
    for item in here:
        if item.function.__module__.startswith("tests.spec.") and hasattr(item, "callspec"):
            grids.setdefault((item.path, item.function), []).append(item)
    left_out: set[pytest.Item] = set()
    for grid in grids.values():
        points = [{name: str(value) for name, value in item.callspec.params.items()} for item in grid]
        kept = set(pairwise(points))
        left_out |= {item for place, item in enumerate(grid) if place not in kept}
    if left_out:
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]
