"""What the adapters share around a call: what is asked for, and who normalized."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from norm_plugin import settings
from norm_plugin.dispatch import BackendError, Declined
from norm_plugin.engines import call_counts
from norm_plugin.native.rms import wide


def asked(family: str) -> bool:
    """Whether this family of engine layers is to be taken."""
    return family in settings.get().ops


def refused(op: str, x: Tensor, weight: Tensor | None, reason: str) -> None:
    """The engine's own norm goes on, for a reason that is counted; under NORM_PLUGIN_STRICT=1 nothing goes on."""
    if settings.get().strict:
        raise BackendError(
            f"{op} of {list(x.shape)} {x.dtype} is left to the engine: {reason}. NORM_PLUGIN_STRICT=1 forbids that; "
            "unset it, or leave this family out of NORM_PLUGIN_OPS."
        )
    call_counts.count(op, x, weight, reason)


def or_declined(original: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    """Ours, or the original where no kernel can do the call: of a method of a layer, or a function of x."""

    @wraps(ours)
    def forward(*args: Any, **named: Any) -> Any:
        try:
            return ours(*args, **named)
        except Declined as declined:
            tensors = (value for value in (*args, *named.values()) if isinstance(value, Tensor))
            weight = getattr(args[0], "weight", None) if args else None
            refused(declined.op, next(tensors), named.get("weight", weight), declined.reason)
            return original(*args, **named)

    return forward


def widened_sum(x: Tensor, residual: Tensor) -> Tensor:
    """x + residual with nothing rounded."""
    return wide(x) + wide(residual)


def traced() -> bool:
    """Whether a compiler reads this code instead of running it: then the engine's own goes into its graph."""
    return torch.compiler.is_compiling()
