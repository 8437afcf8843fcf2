"""The gradients of the norms in plain PyTorch: the specification of the backward kernels.

Each op computes from the inputs alone; it computes means and scales again. A gradient passes through roundings
unchanged, so all numerics have the same gradient. An op returns the gradient of x first, then those of z, weight and
bias as far as they are asked for, each in the dtype of its argument.
"""

from __future__ import annotations

import torch
from torch import Tensor

from norm_plugin.native.gated import by_group, gate, grouped
from norm_plugin.native.layer import affine, standardized
from norm_plugin.native.rms import inverse_rms, reduce_rows, stored, wide


def sum_rows(g: Tensor, like: Tensor) -> Tensor:
    """The gradient of a parameter that all rows share: [..., N] -> [N], in its dtype."""
    return g.reshape(-1, g.shape[-1]).sum(0).to(like.dtype)


def rmsnorm_backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor | None,
    residual_grad: Tensor | None = None,
    eps: float = 1e-6,
    gemma: bool = False,
    variance_size: int | None = None,
    weight_grad: bool = True,
) -> list[Tensor]:
    """[dinput, dweight]. For a fused add, `input` is the sum, and `residual_grad` is the gradient of the returned sum,
    which is added to dinput before the rounding."""
    h = wide(input)
    s = inverse_rms(h, eps, variance_size)
    xhat, g = h * s, grad.to(h.dtype)
    gw = g if weight is None else g * (weight.to(h.dtype) + 1 if gemma else weight.to(h.dtype))
    shared = reduce_rows(torch.sum, gw * xhat) / (variance_size or h.shape[-1])
    pulled = xhat * (s * shared)
    if variance_size is not None:
        pulled[..., variance_size:] = 0  # these columns do not reach s
    dh = torch.addcmul(-pulled, gw, s)
    if residual_grad is not None:
        dh = dh + residual_grad.to(h.dtype)
    return [stored(dh, input), *([sum_rows(g * xhat, weight)] if weight is not None and weight_grad else [])]


def l2norm_backward(grad: Tensor, input: Tensor, eps: float = 1e-6) -> Tensor:
    """dinput of l2norm."""
    h = wide(input)
    s = torch.rsqrt(reduce_rows(torch.sum, h.pow(2)) + eps)
    g, y = grad.to(h.dtype), h * s
    return stored(torch.addcmul(-y * (s * reduce_rows(torch.sum, g * y)), g, s), input)


def standardized_backward(g: Tensor, weight: Tensor | None, xhat: Tensor, rstd: Tensor, centred: bool = True) -> Tensor:
    """dh of a standardized row, from the gradient of xhat * weight. `centred`: a mean was subtracted."""
    gw = affine(g, weight, None)
    pulled = xhat * (rstd * reduce_rows(torch.mean, gw * xhat))
    if centred:
        gw = affine(g, weight, -reduce_rows(torch.mean, gw))
    return torch.addcmul(-pulled, gw, rstd)


def parameters(
    g: Tensor, xhat: Tensor, weight: Tensor | None, bias: Tensor | None, weight_grad: bool, bias_grad: bool
) -> list[Tensor]:
    """Those of [dweight, dbias] that are asked for."""
    dweight = [sum_rows(g * xhat, weight)] if weight is not None and weight_grad else []
    return dweight + ([sum_rows(g, bias)] if bias is not None and bias_grad else [])


def layernorm_backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-6,
    weight_grad: bool = True,
    bias_grad: bool = True,
) -> list[Tensor]:
    """[dinput, dweight, dbias]."""
    xhat, _, rstd = standardized(wide(input), eps)
    g = grad.to(xhat.dtype)
    dinput = standardized_backward(g, weight, xhat, rstd)
    return [stored(dinput, input), *parameters(g, xhat, weight, bias, weight_grad, bias_grad)]


def gate_slope(z: Tensor, activation: str) -> Tensor:
    """The derivative of act at z."""
    sigmoid = (1 + torch.exp(-z)).reciprocal()
    rest = (1 + torch.exp(z)).reciprocal()  # 1 - sigmoid, without cancellation
    return sigmoid * rest if activation == "sigmoid" else sigmoid + z * sigmoid * rest


def gated_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
    activation: str = "silu",
    weight_grad: bool = True,
    bias_grad: bool = True,
) -> list[Tensor]:
    """[dx, dz, dweight, dbias]."""
    h = wide(x)
    g, wide_z = grad.to(h.dtype), None if z is None else z.to(h.dtype)
    act = None if wide_z is None else gate(wide_z, activation)
    gate_first = act is not None and not norm_before_gate
    xhat, _, rstd = grouped(h * act if act is not None and gate_first else h, group_size, eps, is_rms_norm)
    flat = xhat.flatten(-2)
    dnormed = g * act if act is not None and norm_before_gate else g
    of_groups = by_group(dnormed, group_size), None if weight is None else by_group(weight, group_size)
    dh = standardized_backward(*of_groups, xhat, rstd, centred=not is_rms_norm).flatten(-2)
    shared = parameters(dnormed, flat, weight, bias, weight_grad, bias_grad)
    if act is None or wide_z is None or z is None:
        return [stored(dh, x), *shared]
    slope = gate_slope(wide_z, activation)
    dx, dz = (dh * act, dh * h * slope) if gate_first else (dh, g * affine(flat, weight, bias) * slope)
    return [stored(dx, x), stored(dz, z), *shared]
