"""The shortcut of eager calls: one call into C++ recognises a signature that already runs on Triton.

Dynamo's tensor guards compare type, dtype, device, sizes, strides, gradients and everything that could trace or
transform a call (dispatch keys and modes) at once, in a third of the time that Python would take. They are no public
interface of torch. If a torch lacks them or has other ones, every call takes the ordinary road.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor

from norm_plugin import dispatch, memory
from norm_plugin.dispatch import Route
from norm_plugin.op import Op

try:
    from torch._C._dynamo import guards as dynamo_guards
except ImportError:
    dynamo_guards = None  # type: ignore[assignment]

#: The number of elements of x, and the addresses of the given tensors in the order of the arguments.
Placed = tuple[int, Sequence[int]]

#: Compares tensors with each other, because a guard looks at one tensor only. For an op that writes, the answer has the
#: addresses of the tensors, so that the launch need not ask for them again.
Agreement = Callable[[tuple[Any, ...]], bool | Placed]

#: The latest plans of an op are kept: a model has few signatures of each op.
MOST_PLANS = 8


@dataclass(frozen=True, eq=False)
class Plan:
    """How to recognise one signature: which tensors are given, their guards, and the other arguments.

    `unrecorded`: an input required a gradient while gradients were off, which the guards do not ask.
    """

    given: tuple[int, ...]
    missing: tuple[int, ...]
    unrecorded: bool
    recognises: Callable[..., bool]
    agree: Agreement | None
    rest: tuple[Any, ...]
    route: Route


def guard(tensors: list[Tensor], by_row: list[bool]) -> Callable[..., bool] | None:
    """A check for tensors like these. Those that are `by_row` may have any first size."""
    sizes = [
        [None if rows and t.dim() > 1 and i == 0 else n for i, n in enumerate(t.shape)]
        for t, rows in zip(tensors, by_row, strict=True)
    ]
    strides = [list(t.stride()) for t in tensors]
    try:
        guards: Any = dynamo_guards.TensorGuards
        check: Callable[..., bool] = guards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
        return check if check(*tensors) else None
    except (AttributeError, TypeError, ValueError, RuntimeError):  # a torch with other guards, or without any
        return None


def agreement(op: Op, tensors: tuple[Tensor | None, ...], given: tuple[int, ...]) -> Agreement | None:
    """What is left of checks.check_shapes and check_memory, if all sizes but the first are known to be right."""
    x = op.x
    if op.one_a_row:
        rows = [i for i in given if op.by_row[i]]
        return lambda t: all(t[i].shape[:-1] == t[x].shape[:-1] for i in rows)
    alike = [i for i in op.by_element if i in given]
    if any(i in given for i in op.written):
        return disjoint(op, tensors, alike, given)
    if not alike:
        return None
    if len(alike) == 1:  # nearly every call; a loop would take twice as long
        other = alike[0]
        return lambda t: t[other].numel() == t[x].numel()
    return lambda t: all(t[i].numel() == t[x].numel() for i in alike)


def disjoint(op: Op, tensors: tuple[Tensor | None, ...], alike: list[int], given: tuple[int, ...]) -> Agreement:
    """Agrees if no two tensors lie in one stretch of memory. If two do, the ordinary road looks closer."""
    x = op.x
    reach = {i: _reach(t, op.by_row[i]) for i, t in enumerate(tensors) if t is not None}  # in the order of `given`
    others = [i for i in given if i not in (x, *alike)]
    if len(alike) == 1 and len(others) < 2 and given[0] not in others:  # a loop takes three times as long
        one, two = sorted((x, *alike))
        third = others[0] if others else None
        of_one, of_two = reach[one][0], reach[two][0]
        may_be_one = op.may_be in ((one, two), (two, one)) and _lie_alike(tensors[one], tensors[two])
        of_third = 0 if third is None else reach[third][1]
        between = third is not None and third < two

        def all_apart(t: tuple[Any, ...]) -> bool | Placed:
            first, second = t[one], t[two]
            n: int = first.numel()
            a: int = first.data_ptr()
            b: int = second.data_ptr()
            a_end, b_end = a + n * of_one, b + n * of_two
            if second.numel() != n or not (a_end <= b or b_end <= a or (may_be_one and a == b)):
                return False
            if third is None:
                return n, (a, b)
            c: int = t[third].data_ptr()
            c_end = c + of_third
            if (c_end <= a or a_end <= c) and (c_end <= b or b_end <= c):
                return n, (a, c, b) if between else (a, b, c)
            return False

        return all_apart

    def none_together(t: tuple[Any, ...]) -> bool | Placed:
        n = t[x].numel()
        if any(t[i].numel() != n for i in alike):
            return False
        starts = [t[i].data_ptr() for i in given]
        spans = sorted((start, n * per + fixed) for start, (per, fixed) in zip(starts, reach.values(), strict=True))
        clear = all(start + length <= following for (start, length), (following, _) in pairwise(spans))
        return (n, starts) if clear else False

    return none_together


def _lie_alike(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and memory.same_strides(a, b)


def _reach(t: Tensor, by_row: bool) -> tuple[int, int]:
    """(a, b): if x has n elements, t reaches over at most a * n + b bytes."""
    first, end = memory.span(t)
    if not by_row:
        return 0, end - first
    if t.dim() < 2:
        return -(-(end - first) // t.numel()), 0
    row = math.prod(t.shape[1:])
    return -(-max(t.stride(0) * t.element_size(), memory.bytes_of_a_row(t)) // row), 0


def remember(op: Op, tensors: tuple[Tensor | None, ...], rest: tuple[Any, ...], route: Route) -> None:
    """Makes a plan that recognises this signature from now on."""
    given = tuple(i for i, t in enumerate(tensors) if t is not None)
    present = [t for t in tensors if t is not None]
    if any(i in given and memory.may_cover_itself(tensors[i]) for i in op.written):  # type: ignore[arg-type]
        return  # every call must check whether it does
    if any(plan.route is route and plan.given == given and plan.recognises(*present) for plan in op.plans):
        return  # its plan exists, and only did not agree
    recognises = guard(present, [op.by_row[i] for i in given])
    if recognises is not None:
        missing = tuple(i for i in range(len(tensors)) if i not in given)
        unrecorded = any(t.requires_grad for t in present)
        plan = Plan(given, missing, unrecorded, recognises, agreement(op, tensors, given), rest, route)
        dispatch.keep_plan(route, plan, MOST_PLANS)
