"""LayerNorm, and LayerNorm + linear, in plain PyTorch: the specification."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from norm_plugin.native.rms import sum_rows, wide


def standardized(h: Tensor, eps: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(xhat, mean, rstd). The variance is of the centred row, and what the rounding of the mean left in that row is
    taken off as well, so a large mean costs no digits."""
    mean = h.mean(-1, keepdim=True)
    centred = h - mean
    left = centred.mean(-1, keepdim=True)
    centred = centred - left
    rstd = torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps)
    return centred * rstd, mean + left, rstd


def affine(xhat: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """xhat * weight + bias, each of which may be None, in xhat's dtype."""
    if bias is None:
        return xhat if weight is None else xhat * weight.to(xhat.dtype)
    offset = bias.to(xhat.dtype)
    return xhat + offset if weight is None else torch.addcmul(offset, xhat, weight.to(xhat.dtype))


def layernorm(input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-6) -> Tensor:
    """The LayerNorm of every row, with one rounding."""
    xhat, _, _ = standardized(wide(input), eps)
    return affine(xhat, weight, bias).to(input.dtype)


def simple_layernorm_native(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-6) -> Tensor:
    """`layernorm` under the name it has in the field."""
    return layernorm(x, weight, bias, eps)


def layernorm_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    eps: float = 1e-6,
) -> Tensor:
    """linear(layernorm(x)), the norm rounded to x's dtype and the product taken in the linear weight's."""
    normed = layernorm(x, weight, bias, eps).to(linear_weight.dtype)
    return F.linear(normed, linear_weight, linear_bias)


def stable_layernorm(x: Tensor, gamma: Tensor, eps: float = 1e-5) -> Tensor:
    """layernorm(x / max(x)) of each row, computed so that no row overflows.

    A positive divisor m changes a LayerNorm only through eps: layernorm(x / m, eps) = layernorm(x / a, eps * (m / a)^2)
    for every a > 0. With a the largest magnitude of the row, x / a stays in [-1, 1] whatever m is. A negative m acts
    as |m| (dividing by m itself would flip the sign of the row), m = 0 leaves eps 0, and an all-zero row gives 0.
    """
    h = wide(x)
    magnitude = h.abs().amax(-1, keepdim=True)
    divisor = torch.where(magnitude > 0, magnitude, torch.ones_like(magnitude))
    top = torch.where(magnitude > 0, h.amax(-1, keepdim=True), torch.ones_like(magnitude))
    xhat, _, _ = standardized(h / divisor, eps * (top / divisor).pow(2))
    return (xhat * gamma.to(h.dtype)).to(x.dtype)


def standardized_backward(gw: Tensor, xhat: Tensor, rstd: Tensor, centred: bool = True) -> Tensor:
    """dh of a standardized row, from the gradient of xhat; `centred` is False where no mean was taken off."""
    dh = gw - xhat * (gw * xhat).mean(-1, keepdim=True)
    return rstd * (dh - gw.mean(-1, keepdim=True) if centred else dh)


def layernorm_backward(grad: Tensor, input: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(dinput, dweight, dbias) in the wide dtype."""
    xhat, _, rstd = standardized(wide(input), eps)
    g = grad.to(xhat.dtype)
    return standardized_backward(affine(g, weight, None), xhat, rstd), sum_rows(g * xhat), sum_rows(g)


def layernorm_linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, linear_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias, dlinear_weight, dlinear_bias); the norm is computed again rather than kept."""
    normed = layernorm(x, weight, bias, eps).to(linear_weight.dtype)
    dnormed = grad @ linear_weight
    rows = grad.reshape(-1, grad.shape[-1])
    dlinear_weight = rows.t() @ normed.reshape(-1, normed.shape[-1])
    return *layernorm_backward(dnormed, x, weight, eps), dlinear_weight, wide(rows).sum(0)
