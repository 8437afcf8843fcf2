"""Bounds of the error of an op's arithmetic before its last rounding, which may cost half an ulp more.

Every bound is an absolute amount for each element, in fp64, and follows from the formula: each product, sum and root in
fp32 has an error that is a share of the magnitudes it is made of, plus one subnormal if it underflows. Nothing in a
bound is measured.
"""

from __future__ import annotations

import torch
from torch import Tensor

from norm_plugin.accuracy import oracle
from norm_plugin.numerics import FP32, GATED_NUMERICS, LAYER_QUANT_NUMERICS

#: The most roundings of a value; see the nudges of the oracle.
ROUNDINGS = 16

#: The least subnormal of fp32.
SUBNORMAL = 2.0**-149


def rounding(dtype: torch.dtype) -> float:
    """The relative error of one rounding. Inputs of less than fp32 are computed in fp32."""
    return 2.0**-53 if dtype == torch.float64 else 2.0**-24


def magnitude(factor: Tensor | float) -> Tensor | float:
    """|factor|."""
    return factor.abs() if isinstance(factor, Tensor) else abs(factor)


def product(value: Tensor, dtype: torch.dtype, *factors: Tensor | float, least: float = SUBNORMAL) -> Tensor:
    """Of a product: a share of the value, and a subnormal, lost early, which all factors enlarge."""
    lost: Tensor = torch.full_like(value, least)
    for factor in factors:
        lost = lost * (1 + magnitude(factor))
    return ROUNDINGS * rounding(dtype) * value.abs() + lost


def rmsnorm(
    input: Tensor,
    weight: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    gemma: bool = False,
    variance_size: int | None = None,
    least: float = SUBNORMAL,
) -> Tensor:
    """Of rmsnorm, or of add_rmsnorm if a residual is given, in all numerics."""
    h = input.double() if residual is None else input.double() + residual.double()
    s, w = oracle.inverse_root(h, eps, variance_size), oracle.factor(weight, gemma)
    return product(h * s * w, input.dtype, s, w, least=least)


def l2norm(input: Tensor, eps: float = 1e-6, least: float = SUBNORMAL) -> Tensor:
    """Of l2norm."""
    h = input.double()
    s = 1 / (h.square().sum(-1, keepdim=True) + eps).sqrt()
    return product(h * s, input.dtype, s, least=least)


def layernorm(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-6, least: float = SUBNORMAL
) -> Tensor:
    """Of layernorm. The error of the mean, a share of the centred row, adds to every element of the row."""
    return gated_norm(input, weight, bias, eps=eps, least=least)


def layernorm_to_quantise(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-6,
    numerics: str = FP32.name,
    least: float = SUBNORMAL,
) -> Tensor:
    """Of the LayerNorm that layernorm_quant quantises. A rounded one is exact, unless it lay next to a tie."""
    off = layernorm(input, weight, bias, eps, least)
    if LAYER_QUANT_NUMERICS[numerics].round_before_quant:
        below, above = ends(oracle.layernorm(input, weight, bias, eps), off, input.dtype)
        off = above - below
    return off


def gated_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
    activation: str = "silu",
    numerics: str = FP32.name,
    least: float = SUBNORMAL,
) -> Tensor:
    """Of layernorm_fn and rmsnorm_fn."""
    how = (eps, group_size, norm_before_gate, is_rms_norm, activation)
    xhat, _, rstd = oracle.normalized_groups(x, z, *how)
    act = 1.0 if z is None else oracle.gate(z, activation)
    gate_first = z is not None and not norm_before_gate
    h, s = (x.double() * act if gate_first else x.double()), rstd.repeat_interleave(group_size or x.shape[-1], -1)
    terms = xhat.abs() if is_rms_norm else xhat.abs() + 1
    if gate_first:  # the gated row is rounded before it is centred, so its size counts, not only its spread
        size = h.unflatten(-1, (-1, group_size or x.shape[-1])).square().mean(-1).sqrt() * rstd
        terms = terms * (1 + 2 * size.repeat_interleave(group_size or x.shape[-1], -1)) + h.abs() * s
    factor, offset = oracle.factor(weight), oracle.offset(bias)
    y = terms * magnitude(factor) + magnitude(offset)
    after = 1.0 if gate_first else magnitude(act)
    bound = product(y * after, x.dtype, s, factor, act, least=least)
    if GATED_NUMERICS[numerics].round_before_weight:
        off = product(terms, x.dtype, s, act, least=least)
        below, above = (v * factor + offset for v in ends(xhat, off, x.dtype))
        off = product(y, x.dtype, least=least)
        low, high = torch.minimum(below, above) - off, torch.maximum(below, above) + off
        bound = bound + (oracle.rounded(high, x.dtype) - oracle.rounded(low, x.dtype)) * after
    return bound


def ends(value: Tensor, off: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The least and the largest b(value), if the value may be off. They differ only next to a tie."""
    return oracle.rounded(value - off, dtype), oracle.rounded(value + off, dtype)


def split_sums(x: Tensor, z: Tensor | None, least: float = SUBNORMAL) -> Tensor:
    """Of split_sums: twice ROUNDINGS, because no root halves the error, and the loss of squares that underflow."""
    h = oracle.gated_part(x, z)
    off = product(h, x.dtype, x.double(), least=least)
    squares = 2 * h.abs() * off + least
    return 2 * ROUNDINGS * rounding(x.dtype) * oracle.split_sums(x, z) + squares.sum(-1, keepdim=True)


def split_rmsnorm(
    x: Tensor,
    weight: Tensor | None,
    z: Tensor | None,
    sums: Tensor,
    full_width: int,
    eps: float = 1e-6,
    numerics: str = FP32.name,
    least: float = SUBNORMAL,
) -> Tensor:
    """Of split_rmsnorm."""
    s, factor = oracle.root_of_sums(sums, full_width, eps), oracle.factor(weight)
    xhat = oracle.gated_part(x, z) * s
    bound = product(xhat * factor, x.dtype, s, factor, x.double(), least=least)
    if GATED_NUMERICS[numerics].round_before_weight:
        below, above = ends(xhat, product(xhat, x.dtype, s, x.double(), least=least), x.dtype)
        bound = bound + (above - below) * magnitude(factor)
    return bound


def layernorm_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    eps: float = 1e-6,
    least: float = SUBNORMAL,
) -> Tensor:
    """Of layernorm_linear. A norm next to a tie may round to either side, and the product sums its terms one by one.

    torch.nn.functional.linear rounds its product before it adds the bias, if cuBLAS has no kernel that does both: on an
    H100 for 9 of 120 shapes.
    """
    normed, off = oracle.layernorm(x, weight, bias, eps), layernorm(x, weight, bias, eps, least)
    below, above = (v.to(linear_weight.dtype).double() for v in ends(normed, off, x.dtype))
    matrix = linear_weight.double().abs().t()
    summed = normed.abs() @ matrix + magnitude(oracle.offset(linear_bias))
    bound = (above - below) @ matrix + (x.shape[-1] + 1) * rounding(linear_weight.dtype) * summed
    if linear_bias is not None and x.is_cuda:
        bound = bound + torch.finfo(linear_weight.dtype).eps / 2 * (normed @ linear_weight.double().t()).abs()
    return bound
