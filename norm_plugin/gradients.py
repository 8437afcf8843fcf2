"""The gradients of the ops: the backward ops, and what autograd keeps for them.

A backward op is an op like any other: it has a native function and a kernel, and dispatch says which of them runs, and
why. Autograd keeps only x (for a fused add, the sum that is returned anyway), z and the parameters, because the
statistics of a row cost less to compute again than to read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from norm_plugin import library, ops
from norm_plugin.dispatch import log_once
from norm_plugin.library import Arguments, Tensors
from norm_plugin.native import backward
from norm_plugin.native.layer import without_autocast
from norm_plugin.native.rms import new_output
from norm_plugin.op import Op

BACKWARD_OPS: dict[str, Op] = {}

Wanted = tuple[bool, ...]


def _declare(native: Callable[..., Any], **declared: Any) -> Op:
    """Declares a backward op. It has a gradient too, for its tensors, which are its first arguments."""
    op = library.declare(BACKWARD_OPS, native, **declared)
    tensors = len(op.tensors)

    def again(kept: Tensors, wanted: Wanted, *rest: Any) -> Tensors:
        log_once(f"the gradient of {op.name} (a second derivative) is computed by PyTorch")
        constants, grads = rest[:-1], rest[-1]
        with torch.enable_grad():
            leaves = [None if t is None else t.detach().requires_grad_() for t in kept]
            outputs = op.native(*leaves, *constants)
        pairs = [(o, g) for o, g in zip(_listed(outputs), _listed(grads), strict=True) if g is not None]
        places = [i for i, t in enumerate(leaves) if t is not None]
        found: list[Tensor | None] = [None] * tensors
        inputs = [t for t in leaves if t is not None]
        outs, out_grads = zip(*pairs, strict=True)
        for place, grad in zip(places, torch.autograd.grad(outs, inputs, out_grads, allow_unused=True), strict=True):
            found[place] = grad
        return tuple(found)

    library.differentiable(op, _first(tensors), again, *op.arguments[tensors:])
    return op


def _listed(found: Any) -> list[Any]:
    return list(found) if isinstance(found, (list, tuple)) else [found]


def _first(count: int) -> Callable[..., Tensors]:
    """Keeps the first `count` arguments."""
    return lambda inputs, output: inputs[:count]


def _like(a: Arguments, *names: str) -> list[Tensor]:
    """An empty gradient for each of these arguments that is given and asked for."""
    wanted = [a[name] for name in names if a[name] is not None and a.get(f"{name}_grad", True)]
    return [new_output(t) for t in wanted]


def _in_places(found: list[Tensor], *given: bool) -> list[Tensor | None]:
    """Puts the gradients that a backward op returned in their places, with None where `given` is False."""
    rest = iter(found)
    return [next(rest) if there else None for there in given]


# --- rms ----------------------------------------------------------------------------------------------------------

RMSNORM_BACKWARD = _declare(
    backward.rmsnorm_backward,
    fake=lambda a: _like(a, "input", "weight"),
    normalized="input",
    by_element="grad residual_grad",
    shared="weight",
)
L2NORM_BACKWARD = _declare(backward.l2norm_backward, normalized="input", by_element="grad")
_RMS_CONSTANTS = ("eps", "gemma", "variance_size")


def _rmsnorm(
    kept: Any, wanted: Wanted, eps: float, gemma: bool, variance_size: int | None, grad: Tensor | None
) -> Tensors:
    input, weight = kept
    return _of_sum(input, weight, None, wanted[1], eps, gemma, variance_size, grad)


def _add_rmsnorm(
    kept: Any, wanted: Wanted, eps: float, gemma: bool, variance_size: int | None, grad: Tensor | None, beside: Any
) -> Tensors:
    total, weight = kept
    dtotal, dweight = _of_sum(total, weight, beside, wanted[2], eps, gemma, variance_size, grad)
    return dtotal, dtotal, dweight


def _of_sum(
    total: Tensor, weight: Tensor | None, beside: Tensor | None, weight_grad: bool, eps: float, gemma: bool,
    variance_size: int | None, grad: Tensor | None,
) -> Tensors:  # fmt: skip
    """(dtotal, dweight) of norm(total). `beside` is the gradient of the sum, if the op returned it beside its norm."""
    if grad is None:  # the norm was not used
        return beside, None
    weight_grad = weight_grad and weight is not None
    found = torch.ops.norm_plugin.rmsnorm_backward(grad, total, weight, beside, eps, gemma, variance_size, weight_grad)
    dtotal, dweight = _in_places(found, True, weight_grad)
    return dtotal, dweight


def _l2norm(kept: Any, wanted: Wanted, eps: float, grad: Tensor) -> Tensors:
    return (torch.ops.norm_plugin.l2norm_backward(grad, kept[0], eps),)


library.differentiable(ops.RMSNORM, _first(2), _rmsnorm, *_RMS_CONSTANTS)
library.differentiable(ops.ADD_RMSNORM, lambda inputs, output: (output[1], inputs[2]), _add_rmsnorm, *_RMS_CONSTANTS)
library.differentiable(ops.L2NORM, _first(1), _l2norm, "eps")


def _rmsnorm_out(input: Tensor, weight: Tensor | None, out: Tensor, *how: Any) -> None:
    kept = input.clone()  # the gradient needs the input, which out may overwrite
    out.copy_(torch.ops.norm_plugin.rmsnorm(kept, weight, *how))


def _fused_add_rmsnorm(input: Tensor, residual: Tensor, weight: Tensor | None, *how: Any) -> None:
    out, new_residual = torch.ops.norm_plugin.add_rmsnorm(input, residual, weight, *how)
    input.copy_(out)
    residual.copy_(new_residual)


ops.RMSNORM_OUT.recorded = _rmsnorm_out
ops.FUSED_ADD_RMSNORM.recorded = _fused_add_rmsnorm

# --- layer --------------------------------------------------------------------------------------------------------

LAYERNORM_BACKWARD = _declare(
    backward.layernorm_backward,
    fake=lambda a: _like(a, "input", "weight", "bias"),
    normalized="input",
    by_element="grad",
    shared="weight bias",
)


def _layernorm(kept: Any, wanted: Wanted, eps: float, grad: Tensor) -> Tensors:
    input, weight, bias = kept
    asked = [need and p is not None for need, p in zip(wanted[1:3], (weight, bias), strict=True)]
    found = torch.ops.norm_plugin.layernorm_backward(grad, input, weight, bias, eps, *asked)
    return tuple(_in_places(found, True, *asked))


def _layernorm_linear(kept: Any, wanted: Wanted, eps: float, grad: Tensor) -> Tensors:
    """Two matrix products by PyTorch, and the gradient of the norm. The linear weight's gradient computes the norm
    again."""
    x, weight, bias, linear_weight = kept
    rows = grad.reshape(-1, grad.shape[-1])
    norm: Tensors = (None, None, None)
    dlinear_weight = None
    with without_autocast(x.device):
        if any(wanted[:3]):
            norm = _layernorm((x, weight, bias), wanted, eps, grad @ linear_weight)
        if wanted[3]:
            normed = torch.ops.norm_plugin.layernorm(x, weight, bias, eps).to(linear_weight.dtype)
            dlinear_weight = rows.t() @ normed.reshape(-1, normed.shape[-1])
    return *norm, dlinear_weight, rows.sum(0) if wanted[4] else None


library.differentiable(ops.LAYERNORM, _first(3), _layernorm, "eps")
library.differentiable(ops.LAYERNORM_LINEAR, _first(4), _layernorm_linear, "eps")

# --- gated --------------------------------------------------------------------------------------------------------

GATED_NORM_BACKWARD = _declare(
    backward.gated_norm_backward,
    fake=lambda a: _like(a, "x", "z", "weight", "bias"),
    normalized="x",
    by_element="grad z",
    shared="weight bias",
)


def _gated_norm(
    kept: Any, wanted: Wanted, eps: float, group_size: int | None, norm_before_gate: bool, is_rms_norm: bool,
    activation: str, grad: Tensor,
) -> Tensors:  # fmt: skip
    x, weight, bias, z = kept
    asked = [need and p is not None for need, p in zip(wanted[1:3], (weight, bias), strict=True)]
    found = torch.ops.norm_plugin.gated_norm_backward(
        grad, x, weight, bias, z, eps, group_size, norm_before_gate, is_rms_norm, activation, *asked
    )
    dx, dz, dweight, dbias = _in_places(found, True, z is not None, *asked)
    return dx, dweight, dbias, dz


library.differentiable(
    ops.GATED_NORM, _first(4), _gated_norm, "eps", "group_size", "norm_before_gate", "is_rms_norm", "activation"
)
