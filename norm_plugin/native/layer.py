"""LayerNorm, and LayerNorm + linear, in plain PyTorch: the specification."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from norm_plugin.native.rms import reduce_rows, stored, wide
from norm_plugin.numerics import FP32, LAYER_NUMERICS


def standardized(h: Tensor, eps: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(xhat, mean, rstd). The row is centred twice, so that the rounding of a large mean costs no digits."""
    mean = reduce_rows(torch.mean, h)
    centred = h - mean
    left = reduce_rows(torch.mean, centred)
    variance = (reduce_rows(torch.mean, centred.pow(2)) - left * left).clamp(min=0)
    rstd = torch.rsqrt(variance + eps)
    return torch.addcmul(-left * rstd, centred, rstd), mean + left, rstd


def affine(xhat: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """xhat * weight + bias, each of which may be None, in xhat's dtype."""
    if bias is None:
        return xhat if weight is None else xhat * weight.to(xhat.dtype)
    offset = bias.to(xhat.dtype)
    return xhat + offset if weight is None else torch.addcmul(offset, xhat, weight.to(xhat.dtype))


def layernorm(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-6, numerics: str = FP32.name
) -> Tensor:
    """The LayerNorm of every row, with one rounding."""
    if LAYER_NUMERICS[numerics].torch_functions:
        return stored(torch_layernorm(input, weight, bias, eps), input)
    xhat, _, _ = standardized(wide(input), eps)
    return stored(affine(xhat, weight, bias), input)


def torch_layernorm(input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """PyTorch's own. It takes parameters in the dtype of x, or in fp32 if x is fp16 or bf16; others are widened."""
    if {p.dtype for p in (weight, bias) if p is not None} <= {input.dtype}:
        return F.layer_norm(input, input.shape[-1:], weight, bias, eps)
    h = wide(input)
    w, b = (None if p is None else p.to(h.dtype) for p in (weight, bias))
    return F.layer_norm(h, h.shape[-1:], w, b, eps)


def simple_layernorm_native(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-6) -> Tensor:
    """`layernorm` under the name that other libraries use."""
    return layernorm(x, weight, bias, eps)


def layernorm_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    eps: float = 1e-6,
) -> Tensor:
    """linear(layernorm(x)). The norm is rounded to the dtype of x; the product has the dtype of the linear weight."""
    return linear(layernorm(x, weight, bias, eps), linear_weight, linear_bias)


def linear(normed: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> Tensor:
    """F.linear in the weight's dtype, contiguous, without autocast, which does not reach an op in compiled code. In two
    dimensions F.linear rounds once; in more it may round the product before it adds the bias."""
    rows = normed.to(linear_weight.dtype).reshape(-1, normed.shape[-1])
    with without_autocast(normed.device):
        return F.linear(rows, linear_weight, linear_bias).view(*normed.shape[:-1], linear_weight.shape[0])


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Turns autocast off in the block, if it is on."""
    autocasting = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if autocasting else nullcontext()


def divided_by_max(x: Tensor) -> Tensor:
    """x / |max(x)| of each row in the wide dtype. It and its square are finite, so it has a LayerNorm.

    With a the largest magnitude of the row, a maximum smaller than a * 2^-40 is replaced by a * 2^-40. Such a row has
    an element near 0 and one of magnitude a, so with either divisor eps is below the last digit of the variance. The
    divisor is a magnitude, because a negative one would flip the sign of the row. A row of zeros is unchanged.
    """
    h = wide(x)
    magnitude = h.abs().amax(-1, keepdim=True)
    divisor = torch.maximum(h.amax(-1, keepdim=True).abs(), magnitude * 2.0**-40)
    return h / torch.where(divisor > 0, divisor, torch.ones_like(divisor))
