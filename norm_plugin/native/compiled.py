"""A native op through torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any, cast

import torch


def compiled(native: Callable[..., Any]) -> Callable[..., Any]:
    """`native`, compiled for itself alone.

    torch.compile keeps its variants with the code object, and from the ninth on runs them eagerly; so each call of this
    function takes a copy of the code. And it checks at every call that no function or table that `native` names was
    replaced, a cost that the formula written out would not have; they are constants, so that check is left out.
    """
    f = cast(FunctionType, native)
    alone = FunctionType(f.__code__.replace(), f.__globals__, f.__name__, f.__defaults__, f.__closure__)
    return torch.compile(alone, options={"guard_filter_fn": torch.compiler.skip_guard_on_globals_unsafe})
