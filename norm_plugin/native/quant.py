"""Norms with a quantised output, in plain PyTorch: the specification.

These ops quantise the fp32 norm before its last rounding, as FlashInfer's RMSNorms do. With numerics `hf` they quantise
the rounded b(b(h * s) * w), as vLLM's fused kernels do; with `flashinfer_layer` (only LayerNorm) the rounded LayerNorm,
as FlashInfer's does. A static scale is a product with its reciprocal. Dynamic fp8 divides by the scale (vLLM, FBGEMM);
dynamic int8 multiplies by the reciprocal (vLLM). `enable_pdl` is for kernels and has no effect here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from norm_plugin.native.gated import by_group
from norm_plugin.native.layer import affine, standardized
from norm_plugin.native.rms import added, inverse_rms, scaled, stored, wide, wide_dtype
from norm_plugin.numerics import FP32, LAYER_QUANT_NUMERICS, NUMERICS

#: The largest value of each output dtype, and the least scale that a dynamic quantisation writes (vLLM's).
QMAX: dict[torch.dtype, float] = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0, torch.int8: 127.0}
MIN_SCALE: dict[torch.dtype, float] = {
    torch.float8_e4m3fn: 1.0 / (448.0 * 512.0),
    torch.float8_e5m2: 1.0 / (57344.0 * 512.0),
    torch.int8: torch.finfo(torch.float32).eps,
}


def cast(y: Tensor, dtype: torch.dtype) -> Tensor:
    """y rounded to nearest even and saturated to `dtype`."""
    if dtype == torch.int8:
        return y.round().clamp(-128, 127).to(dtype)
    return y.clamp(-QMAX[dtype], QMAX[dtype]).to(dtype)


def dynamic(y: Tensor, dtype: torch.dtype, bound: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(y quantised by its largest magnitude along the last dimension, the scales [..., 1]), both contiguous."""
    y = y.contiguous()
    largest = y.abs().amax(-1, keepdim=True)
    if bound is not None:
        largest = torch.minimum(largest, bound.to(largest.dtype))
    qmax = torch.full((), QMAX[dtype], dtype=largest.dtype, device=largest.device)  # CUDA multiplies by 1 / a number
    scale = (largest / qmax).clamp(min=MIN_SCALE[dtype])
    return cast(y * scale.reciprocal() if dtype == torch.int8 else y / scale, dtype), scale


def normalized(
    input: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, numerics: str, gemma: bool
) -> Tensor:
    """The norm to quantise. A residual is updated in place."""
    named = NUMERICS[numerics]
    if residual is None:
        h = wide(input)
        s = inverse_rms(h, eps)
    else:
        h, s, new_residual = added(input, residual, eps, named)
        residual.copy_(new_residual)
    y = scaled(h, s, weight, named, gemma, input.dtype).to(wide_dtype(input.dtype))  # whatever the residual's dtype
    return y.to(input.dtype).to(y.dtype) if named.round_before_weight else y


def rmsnorm_quant(
    out: Tensor,
    input: Tensor,
    weight: Tensor | None,
    scale: Tensor,
    eps: float = 1e-6,
    numerics: str = FP32.name,
    gemma: bool = False,
    enable_pdl: bool | None = None,
) -> None:
    """out = norm(input), quantised by one scale for the whole tensor."""
    y = normalized(input, None, weight, eps, numerics, gemma)
    out.copy_(cast(y * scale.to(y.dtype).reciprocal(), out.dtype))


def fused_add_rmsnorm_quant(
    out: Tensor,
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    scale: Tensor,
    eps: float = 1e-6,
    numerics: str = FP32.name,
    gemma: bool = False,
    enable_pdl: bool | None = None,
) -> None:
    """residual += input, then out = norm(residual), quantised by one scale. input keeps its values."""
    y = normalized(input, residual, weight, eps, numerics, gemma)
    out.copy_(cast(y * scale.to(y.dtype).reciprocal(), out.dtype))


def rmsnorm_dynamic_quant(
    input: Tensor,
    weight: Tensor | None,
    residual: Tensor | None = None,
    scale_ub: Tensor | None = None,
    eps: float = 1e-6,
    quant_dtype: torch.dtype = torch.float8_e4m3fn,
    numerics: str = FP32.name,
    gemma: bool = False,
    enable_pdl: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, scales [..., 1]), one scale for each row. scale_ub bounds the magnitude that a scale is made from."""
    out, scale = dynamic(normalized(input, residual, weight, eps, numerics, gemma), quant_dtype, scale_ub)
    return stored(out, input, quant_dtype), scale


def rmsnorm_block_quant(
    input: Tensor,
    weight: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int = 128,
    quant_dtype: torch.dtype = torch.float8_e4m3fn,
    numerics: str = FP32.name,
    gemma: bool = False,
    enable_pdl: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, scales [..., N / group_size]), one scale for each block of `group_size` columns of a row."""
    y = normalized(input, residual, weight, eps, numerics, gemma)
    out, scales = dynamic(by_group(y, group_size), quant_dtype)
    return stored(out.flatten(-2), input, quant_dtype), scales.squeeze(-1)


def layernorm_quant(
    out: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor,
    eps: float = 1e-6,
    numerics: str = FP32.name,
) -> None:
    """out = layernorm(input), quantised by one scale for the whole tensor."""
    xhat, _, _ = standardized(wide(input), eps)
    y = affine(xhat, weight, bias)
    if LAYER_QUANT_NUMERICS[numerics].round_before_quant:
        y = y.to(input.dtype).to(y.dtype)
    out.copy_(cast(y * scale.to(y.dtype).reciprocal(), out.dtype))
