"""How a replacement stands in for a layer's method: it answers, or leaves the call to the engine with a reason."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from norm_plugin import settings
from norm_plugin.dispatch import BackendError, Declined
from norm_plugin.engines import call_counts, qk_norms
from norm_plugin.engines.installed_hooks import InstalledHooks


@dataclass(slots=True)
class LeftToEngine:
    """The answer of a replacement that does not take a call of `op`: the engine's own norm runs, for this reason."""

    op: str
    reason: str


Answer = Tensor | tuple[Tensor, Tensor] | LeftToEngine

#: Whether a compiler reads this code instead of running it.
traced = torch.compiler.is_compiling

#: A layer's method, or a function of the engine.
Forward = Callable[..., Any]


def asked(family: str) -> bool:
    """Whether NORM_PLUGIN_OPS names this family of engine layers."""
    return family in settings.get().ops


def replacement(
    hooks: InstalledHooks,
    families: tuple[str, ...],
    original: Forward,
    ours: Callable[..., Answer],
    in_graphs: bool = False,
) -> Forward:
    """The method that calls `ours`, and `original` for the calls that are left to the engine.

    `ours` has the parameters `layer` and `x`, or, in place of a function, `x` and `weight`. A compiler that traces the
    method sees `ours` only with `in_graphs`. Layers of families that NORM_PLUGIN_OPS leaves out run `original`.
    """
    places = {name: place for place, name in enumerate(inspect.signature(ours).parameters)}
    of_x, of_weight = places["x"], places.get("weight")
    left_out = [family for family in families if not asked(family)]

    @wraps(original)
    def forward(*args: Any, **named: Any) -> Any:
        compiling = traced()
        wanted = in_graphs if compiling else hooks.live  # engines keep bound methods, which outlive the hooks
        if not wanted or (left_out and qk_norms.family(args[0], families[0]) in left_out):
            return original(*args, **named)
        try:
            answer = ours(*args, **named)
            if type(answer) is not LeftToEngine:
                return answer
        except Declined as declined:
            answer = LeftToEngine(declined.op, declined.reason)
        if not compiling:
            _count_left(answer, of_x, of_weight, args, named)
        return original(*args, **named)

    forward.__module__ = ours.__module__  # whoever looks at the class sees whose method it has
    return forward


def _count_left(
    left: LeftToEngine, of_x: int, of_weight: int | None, args: tuple[Any, ...], named: dict[str, Any]
) -> None:
    """Count the call, or raise under NORM_PLUGIN_STRICT=1; without rows there is nothing that could differ."""
    x = args[of_x] if of_x < len(args) else named.get("x")
    if of_weight is None:
        weight = getattr(args[0], "weight", None)
    else:
        weight = args[of_weight] if of_weight < len(args) else named.get("weight")
    x = x if isinstance(x, Tensor) else weight
    if not isinstance(x, Tensor):
        return
    if settings.get().strict and x.numel():
        raise BackendError(
            f"{left.op} of {list(x.shape)} {x.dtype} is left to the engine: {left.reason}. NORM_PLUGIN_STRICT=1 "
            "forbids that; unset it, or leave this family out of NORM_PLUGIN_OPS."
        )
    call_counts.count(left.op, x, weight, left.reason)
