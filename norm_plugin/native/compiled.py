"""A native op through torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, cast

import torch


class CompilerError(Exception):
    """torch.compile, or what it made, failed before anything was written; the cause says how."""


def compiled(native: Callable[..., Any], written: Sequence[int] = ()) -> Callable[..., Any]:
    """`native`, compiled for calls that differ in nothing but their tensors: for one signature.

    `written` are the places of the arguments that it writes. The values are computed in the compiled part and copied
    outside it: what fails in it has written nothing then. (Nor can Inductor end one loop over a CPU tensor in two
    writes in place.)
    """

    def computed(*args: Any) -> tuple[Any, list[torch.Tensor | None]]:
        copies = list(args)
        for place in written:
            copies[place] = None if args[place] is None else args[place].clone()
        return native(*copies), [copies[place] for place in written]

    compute = _alone(computed if written else native)

    def run(*args: Any) -> Any:
        try:
            found = compute(*args)
        except (MemoryError, RecursionError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise CompilerError(str(error)) from error
        if not written:
            return found
        result, values = found
        for place, value in zip(written, values, strict=True):
            if value is not None:
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
