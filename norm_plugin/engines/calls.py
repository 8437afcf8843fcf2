"""Our ops as an engine's hooks call them.

If a kernel was asked for and none can do a call, dispatch.Declined is raised before anything is written, and the
engine's own norm runs: it is never slower than our PyTorch. Compiled code has no such choice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from norm_plugin import kernels, ops, settings
from norm_plugin.call import call
from norm_plugin.numerics import FP32, HF, Numerics

#: The device types for which a kernel is asked for.
_with_kernels: set[str] = set()


def prepare() -> None:
    """Find out for which devices a kernel is asked for: once and before, because compiled code cannot."""
    wanted = settings.get().backend != "native"
    _with_kernels.clear()
    _with_kernels.update(t for t in ("cpu", "cuda", "xpu") if wanted and not kernels.unavailable(torch.device(t)))


def numerics_in_place_of(theirs: Numerics, x: Tensor) -> str:
    """Our numerics in place of those of an engine's PyTorch code: a kernel has no PyTorch functions to call."""
    if theirs.torch_functions and x.device.type in _with_kernels:
        return HF.name if theirs.round_before_weight else FP32.name
    return theirs.name


def rmsnorm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    numerics: str = FP32.name,
    gemma: bool = False,
    size: int | None = None,
) -> Tensor:
    """functions.rmsnorm."""
    result: Tensor = call(ops.RMSNORM, (x, weight), (eps, numerics, gemma, size, None), decline=True)
    return result


def add_rmsnorm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    numerics: str = FP32.name,
    gemma: bool = False,
    size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """functions.add_rmsnorm."""
    how = (eps, numerics, gemma, size, None)
    result: tuple[Tensor, Tensor] = call(ops.ADD_RMSNORM, (x, residual, weight), how, decline=True)
    return result


def fused_add_rmsnorm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, numerics: str = FP32.name, gemma: bool = False
) -> None:
    """functions.fused_add_rmsnorm, which writes x and residual."""
    how = (eps, numerics, gemma, None, None)
    call(ops.FUSED_ADD_RMSNORM, (x, residual, weight), how, decline=True)


def layernorm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, numerics: str = FP32.name) -> Tensor:
    """functions.layernorm."""
    result: Tensor = call(ops.LAYERNORM, (x, weight, bias), (eps, numerics), decline=True)
    return result


def gated_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    z: Tensor | None,
    eps: float,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = True,
    activation: str = "silu",
    numerics: str = FP32.name,
) -> Tensor:
    """functions.layernorm_fn, or rmsnorm_fn."""
    how = (eps, group_size, norm_before_gate, is_rms_norm, activation, numerics)
    result: Tensor = call(ops.GATED_NORM, (x, weight, bias, z), how, decline=True)
    return result
