"""Gated LayerNorm and RMSNorm, group by group, in plain PyTorch: the specification.

The gate act(z) multiplies the normalized row (norm_before_gate) or the input (otherwise), in fp32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from norm_plugin.native.layer import affine, standardized
from norm_plugin.native.rms import inverse_rms, stored, wide
from norm_plugin.numerics import ACTIVATIONS, FP32, GATED_NUMERICS, Numerics


def gate(z: Tensor, activation: str, numerics: Numerics = FP32) -> Tensor:
    """act(z) for z in the wide dtype. It uses exp, because on a CPU the bits of torch.sigmoid and F.silu depend on
    where a value lies in its tensor: PyTorch computes full vectors in one way and the rest in another."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; it must be one of {', '.join(ACTIVATIONS)}.")
    if numerics.torch_functions:
        return torch.sigmoid(z) if activation == "sigmoid" else F.silu(z)
    divisor = 1 + torch.exp(-z)
    return divisor.reciprocal() if activation == "sigmoid" else z / divisor


def by_group(h: Tensor, group_size: int | None) -> Tensor:
    """[..., N] as [..., N / group_size, group_size]; one group if group_size is None."""
    size = group_size or h.shape[-1]
    return h.reshape(*h.shape[:-1], h.shape[-1] // size, size)


def grouped(h: Tensor, group_size: int | None, eps: float, is_rms_norm: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """(xhat [..., G, g], mean [..., G, 1] or None, rstd [..., G, 1]) of each group of each row."""
    groups = by_group(h, group_size)
    if is_rms_norm:
        rstd = inverse_rms(groups, eps)
        return groups * rstd, None, rstd
    return standardized(groups, eps)


def weighted(y: Tensor, weight: Tensor | None, bias: Tensor | None, numerics: Numerics, dtype: torch.dtype) -> Tensor:
    """y * weight + bias, as a gate or the output takes it; `dtype` is the activation dtype that b() rounds to."""
    if not numerics.round_before_weight:
        return affine(y, weight, bias)
    return affine(y.to(dtype).to(y.dtype), weight, bias).to(dtype).to(y.dtype)


def gated_norm_with_stats(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    z: Tensor | None,
    eps: float,
    group_size: int | None,
    norm_before_gate: bool,
    is_rms_norm: bool,
    activation: str,
    numerics: str,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(out, mean, rstd); the statistics are [..., G] for G groups, and mean is None for RMSNorm."""
    h = wide(x)
    act = None if z is None else gate(z.to(h.dtype), activation, GATED_NUMERICS[numerics])
    if act is not None and not norm_before_gate:
        h = h * act
    xhat, mean, rstd = grouped(h, group_size, eps, is_rms_norm)
    y = weighted(xhat.flatten(-2), weight, bias, GATED_NUMERICS[numerics], x.dtype)
    if act is not None and norm_before_gate:
        y = y * act
    return stored(y, x), None if mean is None else mean.squeeze(-1), rstd.squeeze(-1)


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
) -> Tensor:
    """The normalized, gated x. Without z there is no gate."""
    return gated_norm_with_stats(
        x, weight, bias, z, eps, group_size, norm_before_gate, is_rms_norm, activation, numerics
    )[0]


def layernorm_fn_native(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
    activation: str = "silu",
) -> Tensor:
    """`layernorm_fn` of mamba_ssm, FLA, vLLM and SGLang, always in PyTorch."""
    return gated_norm(x, weight, bias, z, eps, group_size, norm_before_gate, is_rms_norm, activation)


def rmsnorm_fn_native(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    activation: str = "silu",
) -> Tensor:
    """`rmsnorm_fn` of mamba_ssm, FLA and vLLM, always in PyTorch."""
    return gated_norm(x, weight, bias, z, eps, group_size, norm_before_gate, True, activation)


def _layer_norm_fwd_native(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    z: Tensor | None = None,
    out: Tensor | None = None,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
    activation: str = "silu",
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(out, mean, rstd) of a 2-D x, the statistics fp32 and group-major: entry g * M + row."""
    y, mean, rstd = gated_norm_with_stats(
        x, weight, bias, z, eps, group_size, norm_before_gate, is_rms_norm, activation, FP32.name
    )
    if out is not None:
        y = out.copy_(y)
    return y, None if mean is None else mean.t().flatten(), rstd.t().flatten()
