"""triton-transformer's `layernorm`: a scale and no shift, with an option against overflow."""

from __future__ import annotations

from torch import Tensor

from norm_plugin import checks, functions
from norm_plugin.native import layer


def layernorm(x: Tensor, gamma: Tensor, eps: float = 1e-5, use_triton: bool = False, stable: bool = False) -> Tensor:
    """layernorm(x) * gamma, or with `stable` that of x / max(x), row by row.

    use_triton leaves the backend to the flags, which count what ran and why; without it PyTorch runs. For rows whose
    maximum is 0 or negative, `native.layer.divided_by_max` says what is computed.
    """
    _check(x, gamma, eps)
    h = layer.divided_by_max(x) if stable else x
    normed = functions.layernorm(h, gamma, None, eps) if use_triton else layer.layernorm(h, gamma, None, eps)
    return normed.to(x.dtype)


def _check(x: Tensor, gamma: Tensor, eps: float) -> None:
    """The rules of the op, in this function's names."""
    call = checks.Call("x", {"x": x, "gamma": gamma})
    call.given(tensors=call.arguments, required=call.arguments)
    call.normalized("x", x)
    call.per_column("gamma", gamma)
    call.eps("eps", eps)
    if gamma.device != x.device:
        raise ValueError(f"gamma is on {gamma.device} and x on {x.device}; move gamma to {x.device}.")
