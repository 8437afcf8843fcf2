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
    call = checks.Call("x", {"x": x, "gamma": gamma, "eps": eps})
    call.check()
    call.per_column("gamma", gamma)
    h = layer.divided_by_max(x) if stable else x
    normed = functions.layernorm(h, gamma, None, eps) if use_triton else layer.layernorm(h, gamma, None, eps)
    return normed.to(x.dtype)
