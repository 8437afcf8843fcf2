"""If a kernel fails before its launch began, the native op answers, at any call. If it fails later and writes, the
error is raised: nobody knows what it has written, and the native op would compute from that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import norm_plugin
from norm_plugin import dispatch, settings
from norm_plugin.kernels import backward_configs, configs, launch, rms
from tests.kernels.twins import TRITON
from tests.spec.fake_kernels import warnings_of

BF16 = torch.bfloat16


class Troubled:
    """The real kernel, with a fault at one of its stages."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.compiles: Callable[[tuple[Any, ...], dict[str, Any]], None] = lambda args, named: None
        self.ends: Callable[[], None] = lambda: None

    def warmup(self, *args: Any, grid: Any, **named: Any) -> Any:
        self.compiles(args, named)
        return self.kernel.warmup(*args, grid=grid, **named)

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launched(*args: Any, **named: Any) -> None:
            self.kernel[grid](*args, **named)
            self.ends()

        return launched


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Troubled:
    troubled = Troubled(rms.rms_kernel)
    monkeypatch.setattr(rms, "rms_kernel", troubled)
    dispatch.log_once.cache_clear()
    return troubled


@pytest.fixture(autouse=True)
def falls_back() -> Any:
    with settings.override(strict=False):
        yield


def raising(error: Exception) -> Callable[..., None]:
    def stage(*_: Any) -> None:
        raise error

    return stage


def x_of(rows: int = 4, seed: int = 1) -> Tensor:
    return TRITON.make("normal", (rows, 48), BF16, seed)


def fused(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    x, residual = x.clone(), residual.clone()
    norm_plugin.fused_add_rmsnorm(x, residual, None)
    return x, residual


def expected(rows: int = 4) -> tuple[Tensor, Tensor]:
    with settings.override(backend="native"):
        return fused(x_of(rows), x_of(rows, 2))


def backends() -> set[str]:
    return {route.backend for route in dispatch.routes()}


def test_what_ends_after_its_launch_began_raises(kernel: Troubled) -> None:
    """A hook of a profiler, or a program that dies: the residual is not added a second time."""
    kernel.ends = raising(RuntimeError("the profiler's disk is full"))
    x, residual = x_of(), x_of(seed=2)
    with pytest.raises(RuntimeError, match="the profiler's disk is full"):
        norm_plugin.fused_add_rmsnorm(x, residual, None)
    assert backends() == {"triton"}
    assert torch.equal(residual, expected()[1])


def test_what_writes_nothing_of_its_inputs_is_done_again(kernel: Troubled) -> None:
    kernel.ends = raising(RuntimeError("the profiler's disk is full"))
    with settings.override(backend="native"):
        again = norm_plugin.rmsnorm(x_of(), None)
    assert torch.equal(norm_plugin.rmsnorm(x_of(), None), again)
    assert backends() == {"native"}


@pytest.mark.parametrize("first", [None, 0, 4], ids=["at once", "after none", "after some"])
def test_what_cannot_be_compiled_falls_back_whatever_came_before(
    kernel: Troubled, first: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    """A call without rows launches nothing and proves nothing. A call at an odd address compiles another kernel."""
    buffer = TRITON.make("normal", (2 * 4 * 48 + 1,), BF16)
    odd = buffer[1:].view(2, 4, 48)
    wanted = fused(odd[0], odd[1])
    dispatch.reset()
    if first is not None:
        norm_plugin.fused_add_rmsnorm(x_of(first), x_of(first, 2), None)
    kernel.compiles = raising(RuntimeError("ptxas died"))
    for _ in range(2):
        found = odd.clone(), buffer.clone()[1:].view(2, 4, 48)
        norm_plugin.fused_add_rmsnorm(found[1][0], found[1][1], None)
        with settings.override(backend="native"):
            norm_plugin.fused_add_rmsnorm(found[0][0], found[0][1], None)
        assert torch.equal(found[1], found[0])
    torch.testing.assert_close(found[1][0], wanted[0])
    assert any("the Triton kernel failed: RuntimeError: ptxas died" in line for line in warnings_of(caplog))


def test_a_lean_launch_that_cannot_be_compiled_leaves_the_usual_one(
    kernel: Troubled, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(launch, "processors", lambda device: 1)
    rows = 64

    def dies(args: tuple[Any, ...], named: dict[str, Any]) -> None:
        if not named["tile"].with_row:
            raise RuntimeError("ptxas died")

    x, weight = x_of(8), x_of(1)[0]
    with configs.forced(1, 4, 0, 8):  # four rows a program, eight programs a processor
        few = norm_plugin.rmsnorm(x, weight)
        assert launch_of("rmsnorm").lean_from <= rows
        kernel.compiles = dies
        for _ in range(2):
            many = norm_plugin.rmsnorm(x.repeat(rows // 8, 1), weight)
            assert torch.equal(many[-8:], few)
    assert backends() == {"triton"}
    assert any("large batches are launched as small ones" in line for line in warnings_of(caplog))


def launch_of(op: str) -> Any:
    (bound,) = (route.bound for route in dispatch.routes() if route.op.name == op)
    assert bound is not None
    return bound.launches[0]


@pytest.mark.parametrize("error", [MemoryError("none left"), RecursionError("too deep")], ids=str)
def test_what_is_not_the_kernels_fault_does_not_end_it(kernel: Troubled, error: Exception) -> None:
    for stage in ("compiles", "ends"):
        setattr(kernel, stage, raising(error))
        with pytest.raises(type(error), match=str(error)):
            norm_plugin.rmsnorm(x_of(), None)
        setattr(kernel, stage, lambda *_: None)
        norm_plugin.rmsnorm(x_of(), None)
        assert backends() == {"triton"}
        dispatch.reset()


def test_what_a_gpu_has_no_table_of_takes_the_usual_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, table in ((configs, "static"), (backward_configs, "gated")):
        known = module.tables()
        known = known | {"sm_00": {"rms": known["default"]["rms"]}}
        monkeypatch.setattr(module, "tables", lambda known=known: known)
        assert module.config(table, 4096, 2, "sm_00") == module.config(table, 4096, 2, "sm_99")
