"""triton-transformer's `layernorm`: it scales and does not shift, and has an option against overflow."""

from __future__ import annotations

from torch import Tensor

from norm_plugin import checks, functions
from norm_plugin.native import layer


def layernorm(x: Tensor, gamma: Tensor, eps: float = 1e-5, use_triton: bool = False, stable: bool = False) -> Tensor:
    """layernorm(x) * gamma, row by row. `stable` divides each row by its maximum first.

    With use_triton the flags choose the backend, and routes count the calls; without it PyTorch runs. See
    `native.layer.divided_by_max` for rows whose maximum is 0 or negative.
    """
    _check(x, gamma, eps)
    h = layer.divided_by_max(x) if stable else x
    normed = functions.layernorm(h, gamma, None, eps) if use_triton else layer.layernorm(h, gamma, None, eps)
    return normed.to(x.dtype)


def _check(x: Tensor, gamma: Tensor, eps: float) -> None:
    """Checks by the rules of the op, with the argument names of this function."""
    call = checks.Call("x", {"x": x, "gamma": gamma})
    call.given(tensors=call.arguments, required=call.arguments)
    call.normalized("x", x)
    call.per_column("gamma", gamma)
    call.eps("eps", eps)
    if gamma.device != x.device:
        raise ValueError(f"gamma is on {gamma.device} and x on {x.device}; move gamma to {x.device}.")
