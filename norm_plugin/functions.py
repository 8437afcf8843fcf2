"""The public functions, with the signatures that other libraries have."""

from __future__ import annotations

import torch
from torch import Tensor

from norm_plugin import gradients, ops  # noqa: F401 - importing gradients gives the ops their gradients
from norm_plugin.call import call
from norm_plugin.numerics import FP32

__all__ = [
    "add_rmsnorm",
    "fused_add_rmsnorm",
    "fused_add_rmsnorm_quant",
    "gemma_fused_add_rmsnorm",
    "gemma_rmsnorm",
    "l2norm",
    "layernorm",
    "layernorm_fn",
    "layernorm_linear",
    "layernorm_quant",
    "rmsnorm",
    "rmsnorm_block_quant",
    "rmsnorm_dynamic_quant",
    "rmsnorm_fn",
    "rmsnorm_quant",
]


def rmsnorm(
    input: Tensor,
    weight: Tensor | None,
    eps: float = 1e-6,
    out: Tensor | None = None,
    enable_pdl: bool | None = None,
    *,
    numerics: str = FP32.name,
    gemma: bool = False,
    variance_size: int | None = None,
) -> Tensor:
    """input / rms(input) * weight, row by row. The rms is of the first `variance_size` columns. `out` may be
    `input`."""
    how = (eps, numerics, gemma, variance_size, enable_pdl)
    if out is None:
        result: Tensor = call(ops.RMSNORM, (input, weight), how)
        return result
    call(ops.RMSNORM_OUT, (input, weight, out), how)
    return out


def gemma_rmsnorm(
    input: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    out: Tensor | None = None,
    enable_pdl: bool | None = None,
    *,
    numerics: str = FP32.name,
) -> Tensor:
    """rmsnorm with 1 + weight, added in fp32. `out` may be `input`."""
    return rmsnorm(input, weight, eps, out, enable_pdl, numerics=numerics, gemma=True)


def fused_add_rmsnorm(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float = 1e-6,
    enable_pdl: bool | None = None,
    *,
    numerics: str = FP32.name,
) -> None:
    """residual += input; input = rmsnorm(residual). Both in place."""
    how = (eps, numerics, False, None, enable_pdl)
    call(ops.FUSED_ADD_RMSNORM, (input, residual, weight), how)


def gemma_fused_add_rmsnorm(
    input: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    enable_pdl: bool | None = None,
    *,
    numerics: str = FP32.name,
) -> None:
    """fused_add_rmsnorm with 1 + weight, added in fp32. Both in place."""
    how = (eps, numerics, True, None, enable_pdl)
    call(ops.FUSED_ADD_RMSNORM, (input, residual, weight), how)


def add_rmsnorm(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float = 1e-6,
    *,
    numerics: str = FP32.name,
    gemma: bool = False,
    variance_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(rmsnorm(input + residual), input + residual). Nothing is written in place."""
    how = (eps, numerics, gemma, variance_size, None)
    result: tuple[Tensor, Tensor] = call(ops.ADD_RMSNORM, (input, residual, weight), how)
    return result


def l2norm(x: Tensor, eps: float = 1e-6, output_dtype: torch.dtype | None = None) -> Tensor:
    """x / sqrt(sum(x^2) + eps), row by row."""
    result: Tensor = call(ops.L2NORM, (x,), (eps, output_dtype))
    return result


def layernorm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-6,
    *,
    numerics: str = FP32.name,
) -> Tensor:
    """(input - mean) / std * weight + bias, row by row."""
    result: Tensor = call(ops.LAYERNORM, (input, weight, bias), (eps, numerics))
    return result


def layernorm_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    eps: float = 1e-6,
) -> Tensor:
    """layernorm(x) @ linear_weight.T + linear_bias."""
    result: Tensor = call(ops.LAYERNORM_LINEAR, (x, weight, bias, linear_weight, linear_bias), (eps,))
    return result


def layernorm_fn(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
    activation: str = "silu",
    *,
    numerics: str = FP32.name,
) -> Tensor:
    """The norm of each group of each row, times act(z) after the norm or before it."""
    how = (eps, group_size, norm_before_gate, is_rms_norm, activation, numerics)
    result: Tensor = call(ops.GATED_NORM, (x, weight, bias, z), how)
    return result


def rmsnorm_fn(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    activation: str = "silu",
    *,
    numerics: str = FP32.name,
) -> Tensor:
    """layernorm_fn with RMSNorm."""
    return layernorm_fn(x, weight, bias, z, eps, group_size, norm_before_gate, True, activation, numerics=numerics)


def _scale(scale: Tensor | float, input: Tensor) -> Tensor:
    return scale if isinstance(scale, Tensor) else torch.tensor(scale, dtype=torch.float32, device=input.device)


def rmsnorm_quant(
    out: Tensor,
    input: Tensor,
    weight: Tensor | None,
    scale: Tensor | float,
    eps: float = 1e-6,
    enable_pdl: bool | None = None,
    *,
    numerics: str = FP32.name,
    gemma: bool = False,
) -> None:
    """out = rmsnorm(input) / scale, rounded and saturated to out's dtype (fp8 or int8)."""
    call(ops.RMSNORM_QUANT, (out, input, weight, _scale(scale, input)), (eps, numerics, gemma, enable_pdl))


def fused_add_rmsnorm_quant(
    out: Tensor,
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    scale: Tensor | float,
    eps: float = 1e-6,
    enable_pdl: bool | None = None,
    *,
    numerics: str = FP32.name,
    gemma: bool = False,
) -> None:
    """residual += input, in place; out = rmsnorm(residual) / scale. input keeps its values."""
    how = (eps, numerics, gemma, enable_pdl)
    call(ops.FUSED_ADD_RMSNORM_QUANT, (out, input, residual, weight, _scale(scale, input)), how)


def rmsnorm_dynamic_quant(
    input: Tensor,
    weight: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    quant_dtype: torch.dtype = torch.float8_e4m3fn,
    scale_ub: Tensor | None = None,
    *,
    numerics: str = FP32.name,
    gemma: bool = False,
) -> tuple[Tensor, Tensor]:
    """(rmsnorm(input) / scales, scales [..., 1]), one scale for each row. A residual is added first, in place."""
    how = (eps, quant_dtype, numerics, gemma, None)
    result: tuple[Tensor, Tensor] = call(ops.RMSNORM_DYNAMIC_QUANT, (input, weight, residual, scale_ub), how)
    return result


def rmsnorm_block_quant(
    input: Tensor,
    weight: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int = 128,
    quant_dtype: torch.dtype = torch.float8_e4m3fn,
    *,
    numerics: str = FP32.name,
    gemma: bool = False,
) -> tuple[Tensor, Tensor]:
    """(rmsnorm(input) / scales, scales [..., N / group_size]). A residual is added first, in place."""
    how = (eps, group_size, quant_dtype, numerics, gemma, None)
    result: tuple[Tensor, Tensor] = call(ops.RMSNORM_BLOCK_QUANT, (input, weight, residual), how)
    return result


def layernorm_quant(
    out: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | float,
    eps: float = 1e-6,
    *,
    numerics: str = FP32.name,
) -> None:
    """out = layernorm(input) / scale, rounded and saturated to out's dtype (fp8 or int8)."""
    call(ops.LAYERNORM_QUANT, (out, input, weight, bias, _scale(scale, input)), (eps, numerics))
