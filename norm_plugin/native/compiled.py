"""A native op through torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, cast

import torch


class CompilerError(Exception):
    """torch.compile or its code failed before anything was written. The cause says why."""


def compiled(native: Callable[..., Any], written: Sequence[int] = ()) -> Callable[..., Any]:
    """`native`, compiled for one signature: for calls that differ only in their tensors.

    `written` are the places of the arguments that it writes. The compiled part computes their values, and Python copies
    them afterwards, so a failure in the compiled part has written nothing. (Inductor also cannot end one loop over a
    CPU tensor with two writes in place.)
    """

    def computed(*args: Any) -> tuple[Any, list[torch.Tensor | None]]:
        copies = list(args)
        for place in written:
            copies[place] = None if args[place] is None else args[place].clone()
        return native(*copies), [copies[place] for place in written]

    compute = _compile_alone(computed if written else native)

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


def _compile_alone(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles a copy of the code. torch.compile keeps variants with the code object, and runs the ninth eagerly, so
    each signature has its own. emulate_precision_casts keeps the roundings of a numerics, which Inductor would drop."""
    f = cast(FunctionType, function)
    alone = FunctionType(f.__code__.replace(), f.__globals__, f.__name__, f.__defaults__, f.__closure__)
    return torch.compile(alone, options={"guard_filter_fn": _worth_checking, "emulate_precision_casts": True})


def _worth_checking(guards: Sequence[Any]) -> list[bool]:
    """Whether to check each guard at every call. Nobody replaces the functions and tables that `native` names, and
    other arguments than tensors are part of the signature, so checking these would only cost time."""
    return [not (guard.is_global or guard.guard_type == "CONSTANT_MATCH") for guard in guards]
