"""Every test here runs on the kernels, on what device.py says, and strictly: what falls back to native fails."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from norm_plugin import call as calling
from norm_plugin.op import Op
from tests.kernels import interpreter
from tests.kernels.chosen import skip_without_kernels
from tests.kernels.twins import on_kernels

HERE = Path(__file__).parent


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
def kernels_or_nothing() -> Iterator[None]:
    with on_kernels():
        yield


@pytest.fixture
def recognised(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the shortcut recognised each call."""
    found: list[bool] = []
    recognise = calling.recognise

    def noted(op: Op, tensors: Any, rest: Any) -> Any:
        plan = recognise(op, tensors, rest)
        found.append(plan is not None)
        return plan

    monkeypatch.setattr(calling, "recognise", noted)
    return found


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "without_kernels: needs neither a GPU nor the interpreter")
    config.addinivalue_line("markers", "alone: run last by scripts/test_gpu, in one process: wants all of the GPU")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip_without_kernels(item for item in items if HERE in item.path.parents)
