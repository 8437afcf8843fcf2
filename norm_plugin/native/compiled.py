"""A native op through torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, cast

import torch


def compiled(native: Callable[..., Any], written: Sequence[int] = ()) -> Callable[..., Any]:
    """`native`, compiled for calls that differ in nothing but their tensors: for one signature.

    `written` are the places of the arguments that it writes. Where there are several, the values are computed in the
    compiled part and copied outside it: Inductor fails where one loop over a CPU tensor ends in two writes in place.
    """
    if len(written) < 2:
        return _alone(native)

    def computed(*args: Any) -> tuple[Any, list[torch.Tensor]]:
        copies = list(args)
        for place in written:
            copies[place] = args[place].clone()
        return native(*copies), [copies[place] for place in written]

    compute = _alone(computed)

    def run(*args: Any) -> Any:
        result, values = compute(*args)
        for place, value in zip(written, values, strict=True):
            args[place].copy_(value)
        return result

    return run


def _alone(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile keeps its variants with the code object, and from the ninth on runs them eagerly; so the code is
    copied, and one signature has it for itself. Casts are kept: Inductor would drop the roundings of a numerics."""
    f = cast(FunctionType, function)
    alone = FunctionType(f.__code__.replace(), f.__globals__, f.__name__, f.__defaults__, f.__closure__)
    return torch.compile(alone, options={"guard_filter_fn": _of_tensors_and_modes, "emulate_precision_casts": True})


def _of_tensors_and_modes(guards: Sequence[Any]) -> list[bool]:
    """What has to be checked at every call: not the functions and tables that `native` names, which nobody replaces,
    nor the arguments that are no tensors. Checking those is a cost that the formula written out would not have."""
    return [not (guard.is_global or guard.guard_type == "CONSTANT_MATCH") for guard in guards]
