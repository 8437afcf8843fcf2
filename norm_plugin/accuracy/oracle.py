"""The plain formula of every op in fp64, against which native ops and kernels are measured.

An oracle returns the value before its last rounding, so a correctly rounded result lies within half an ulp of it. If a
numerics rounds in the middle, the oracle rounds there too. Next to a tie, fp32 arithmetic may round to the other side
than fp64. So `nudge` moves values by that relative amount before each such rounding, and a result is right if it agrees
with the oracle of one of `NUDGES`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from norm_plugin.numerics import FP32, GATED_NUMERICS, LAYER_QUANT_NUMERICS, NUMERICS, Numerics

#: 16 roundings of fp32, in both directions. A sum in pairs over 2^17 squares costs at most 17 roundings, and the square
#: root halves their effect. The root, the products and eps cost less than what is left.
NUDGES: tuple[float, ...] = (0.0, -(2.0**-20), 2.0**-20)

#: The (least, largest) value of each quantised dtype, and its least scale in a dynamic quantisation.
RANGES: dict[torch.dtype, tuple[float, float]] = {
    torch.float8_e4m3fn: (-448.0, 448.0),
    torch.float8_e5m2: (-57344.0, 57344.0),
    torch.int8: (-128.0, 127.0),
}
LEAST_SCALES: dict[torch.dtype, float] = {
    torch.float8_e4m3fn: 1 / (448.0 * 512.0),
    torch.float8_e5m2: 1 / (57344.0 * 512.0),
    torch.int8: 2.0**-23,
}


def rounded(value: Tensor, dtype: torch.dtype, nudge: float = 0.0) -> Tensor:
    """b(value), as fp64."""
    return (value * (1 + nudge)).to(dtype).double()


def inverse_root(h: Tensor, eps: float, columns: int | None = None) -> Tensor:
    """1 / sqrt(mean(h^2) + eps) of each row, or of its first `columns`."""
    return 1 / (h[..., :columns].square().mean(-1, keepdim=True) + eps).sqrt()


def centred(h: Tensor) -> Tensor:
    """h - mean, twice, because the rounding of a large mean would show in ulps of fp64."""
    h = h - h.mean(-1, keepdim=True)
    return h - h.mean(-1, keepdim=True)


def factor(weight: Tensor | None, gemma: bool = False) -> Tensor | float:
    """The factor of a normalized row."""
    if weight is None:
        return 1.0
    return weight.double() + 1 if gemma else weight.double()


def offset(bias: Tensor | None) -> Tensor | float:
    """The offset of a normalized row."""
    return 0.0 if bias is None else bias.double()


def weighted(
    xhat: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    numerics: Numerics,
    dtype: torch.dtype,
    nudge: float,
    gemma: bool = False,
) -> Tensor:
    """xhat * w + b; `dtype` is the activation dtype that b() rounds to."""
    if numerics.round_before_weight:
        xhat = rounded(xhat, dtype, nudge)
    return xhat * factor(weight, gemma) + offset(bias)


# --- rms ----------------------------------------------------------------------------------------------------------


def rmsnorm(
    input: Tensor,
    weight: Tensor | None,
    eps: float = 1e-6,
    numerics: str = FP32.name,
    gemma: bool = False,
    variance_size: int | None = None,
    nudge: float = 0.0,
) -> Tensor:
    """h * s * w."""
    h = input.double()
    xhat = h * inverse_root(h, eps, variance_size)
    return weighted(xhat, weight, None, NUMERICS[numerics], input.dtype, nudge, gemma)


def add_rmsnorm(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float = 1e-6,
    numerics: str = FP32.name,
    gemma: bool = False,
    variance_size: int | None = None,
    nudge: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(norm(x + r), x + r)."""
    named = NUMERICS[numerics]
    total = input.double() + residual.double()
    written = rounded(total, residual.dtype, nudge)
    s = inverse_root(written if named.variance_of_rounded_sum else total, eps, variance_size)
    xhat = (written if named.output_of_rounded_sum else total) * s
    return weighted(xhat, weight, None, named, input.dtype, nudge, gemma), total


def l2norm(input: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(sum(x^2) + eps)."""
    h = input.double()
    return h / (h.square().sum(-1, keepdim=True) + eps).sqrt()


# --- layer --------------------------------------------------------------------------------------------------------


def layernorm(input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-6) -> Tensor:
    """(x - mean) / sqrt(var + eps) * w + b."""
    h = centred(input.double())
    return h * inverse_root(h, eps) * factor(weight) + offset(bias)


def layernorm_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    eps: float = 1e-6,
    nudge: float = 0.0,
) -> Tensor:
    """b(layernorm(x)) @ W^T + c. The norm is rounded to the dtype of x, then to that of the linear weight."""
    normed = rounded(rounded(layernorm(x, weight, bias, eps), x.dtype, nudge), linear_weight.dtype)
    return normed @ linear_weight.double().t() + offset(linear_bias)


# --- gated --------------------------------------------------------------------------------------------------------


def gate(z: Tensor, activation: str) -> Tensor:
    """sigmoid(z), or z * sigmoid(z)."""
    sigmoid = 1 / (1 + torch.exp(-z.double()))
    return sigmoid if activation == "sigmoid" else z.double() * sigmoid


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
    nudge: float = 0.0,
) -> Tensor:
    """norm(x) * act(z), or norm(x * act(z)), group by group."""
    xhat, _, _ = normalized_groups(x, z, eps, group_size, norm_before_gate, is_rms_norm, activation)
    named = GATED_NUMERICS[numerics]
    y = weighted(xhat, weight, bias, named, x.dtype, nudge)
    if named.round_before_weight:
        y = rounded(y, x.dtype, nudge)
    return y if z is None or not norm_before_gate else y * gate(z, activation)


def normalized_groups(
    x: Tensor,
    z: Tensor | None,
    eps: float,
    group_size: int | None,
    norm_before_gate: bool,
    is_rms_norm: bool,
    activation: str,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(xhat [..., N], mean [..., G] or None, rstd [..., G])."""
    h = x.double() if z is None or norm_before_gate else x.double() * gate(z, activation)
    groups = h.unflatten(-1, (-1, group_size or h.shape[-1]))
    mean = None if is_rms_norm else groups.mean(-1)
    groups = groups if is_rms_norm else centred(groups)
    rstd = inverse_root(groups, eps)
    return (groups * rstd).flatten(-2), mean, rstd[..., 0]


# --- split ---------------------------------------------------------------------------------------------------------


def gated_part(x: Tensor, z: Tensor | None) -> Tensor:
    """x * silu(z)."""
    return x.double() if z is None else x.double() * gate(z, "silu")


def split_sums(x: Tensor, z: Tensor | None) -> Tensor:
    """The sum of the squares of each row's part."""
    return gated_part(x, z).square().sum(-1, keepdim=True)


def root_of_sums(sums: Tensor, full_width: int, eps: float) -> Tensor:
    """1 / sqrt(mean + eps) of whole rows."""
    return 1 / (sums.double() / full_width + eps).sqrt()


def split_rmsnorm(
    x: Tensor,
    weight: Tensor | None,
    z: Tensor | None,
    sums: Tensor,
    full_width: int,
    eps: float = 1e-6,
    numerics: str = FP32.name,
    nudge: float = 0.0,
) -> Tensor:
    """The norm of the part, from the sums of whole rows."""
    xhat = gated_part(x, z) * root_of_sums(sums, full_width, eps)
    return weighted(xhat, weight, None, GATED_NUMERICS[numerics], x.dtype, nudge)


# --- quant --------------------------------------------------------------------------------------------------------


def quantised(y: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """y / scale, saturated."""
    return (y / scale.double()).clamp(*RANGES[dtype])


def dynamic_scale(y: Tensor, dtype: torch.dtype, upper_bound: Tensor | None = None) -> Tensor:
    """The largest magnitude along the last dimension over the largest of the dtype, [..., 1]."""
    largest = y.abs().amax(-1, keepdim=True)
    if upper_bound is not None:
        largest = torch.minimum(largest, upper_bound.double())
    return (largest / RANGES[dtype][1]).clamp(min=LEAST_SCALES[dtype])


def by_own_scale(y: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(y quantised by its own largest magnitude along the last dimension, that scale [..., 1])."""
    scale = dynamic_scale(y, dtype)
    return quantised(y, scale, dtype), scale


def to_quantise(
    input: Tensor,
    weight: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    numerics: str = FP32.name,
    gemma: bool = False,
    nudge: float = 0.0,
) -> Tensor:
    """The RMSNorm to quantise: before its last rounding, but with `hf` after it."""
    if residual is None:
        y = rmsnorm(input, weight, eps, numerics, gemma, nudge=nudge)
    else:
        y, _ = add_rmsnorm(input, residual, weight, eps, numerics, gemma, nudge=nudge)
    return rounded(y, input.dtype, nudge) if NUMERICS[numerics].round_before_weight else y


def layernorm_to_quantise(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-6,
    numerics: str = FP32.name,
    nudge: float = 0.0,
) -> Tensor:
    """The LayerNorm to quantise: before its last rounding, but with `flashinfer_layer` after it."""
    y = layernorm(input, weight, bias, eps)
    return rounded(y, input.dtype, nudge) if LAYER_QUANT_NUMERICS[numerics].round_before_quant else y
