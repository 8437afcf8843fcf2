"""A native op through torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, cast

import torch


def compiled(native: Callable[..., Any]) -> Callable[..., Any]:
    """`native`, compiled for calls that differ in nothing but their tensors: for one signature.

    torch.compile keeps its variants with the code object, and from the ninth on runs them eagerly; so each call of this
    function takes a copy of the code, which one signature has for itself.
    """
    f = cast(FunctionType, native)
    alone = FunctionType(f.__code__.replace(), f.__globals__, f.__name__, f.__defaults__, f.__closure__)
    return torch.compile(alone, options={"guard_filter_fn": _of_tensors_and_modes})


def _of_tensors_and_modes(guards: Sequence[Any]) -> list[bool]:
    """What has to be checked at every call: not the functions and tables that `native` names, which nobody replaces,
    nor the arguments that are no tensors. Checking those is a cost that the formula written out would not have."""
    return [not (guard.is_global or guard.guard_type == "CONSTANT_MATCH") for guard in guards]
