"""Plants two defects that norm_plugin once had. The sequences must notice them.

Both wrap the `Bound` that a kernel's `bind` returns. So they depend only on `kernels.find`, `Bound` and `integers`, and
on the output being the last tensor of a layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from norm_plugin import kernels
from norm_plugin.ops import OPS

Bind = Callable[..., kernels.Bound]

#: The ops that allocate their output, which is the last tensor of their layout.
ALLOCATING = ("rmsnorm", "l2norm", "layernorm", "gated_norm")


def strides_of_the_first_call(op: str, bind: Bind) -> Bind:
    """Writes the output at the strides of the first call's input, if that had at most one row."""

    def planted(*args: Any) -> kernels.Bound:
        bound = bind(*args)
        if op in ALLOCATING and args[0].dim() == 2 and len(args[0]) < 2:
            for launch in bound.launches:
                integers = list(launch.integers)
                integers[-3] = args[0].stride(0)
                launch.integers = tuple(integers)
        return bound

    return planted


def fallback_from_what_was_written(op: str, bind: Bind) -> Bind:
    """Computes every failed call natively, from an input and a residual that may already hold the result."""

    def planted(*args: Any) -> kernels.Bound:
        bound = bind(*args)

        def lenient(*given: Any) -> Any:
            try:
                return bound.run(*given)
            except Exception:
                return OPS[op].native(*given)

        return kernels.Bound(lenient, bound.launches) if op in OPS else bound

    return planted


#: The functions with a defect. Among all functions it would take luck for two calls of one signature to meet.
ABOUT = {"output strides": ("rmsnorm", "layernorm"), "fallback": ("fused_add_rmsnorm",)}

DEFECTS = {"output strides": strides_of_the_first_call, "fallback": fallback_from_what_was_written}


@contextmanager
def planted(name: str) -> Iterator[None]:
    """Plants one of the defects in every kernel."""
    find = kernels.find

    def found(kind: str, op: str) -> Bind | None:
        bind = find(kind, op)
        return None if bind is None else DEFECTS[name](op, bind)

    with mock.patch.object(kernels, "find", found):
        yield
