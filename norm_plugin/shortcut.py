"""The shortcut of eager calls: a signature that already runs on Triton is recognised by one call into C++.

Dynamo's tensor guards compare type, dtype, device, sizes, strides, gradients and everything that could trace or
transform a call (dispatch keys and modes) at once, in a third of the time that Python takes to ask. They are no public
interface of torch: where they are missing or differ, every call takes the ordinary road.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from norm_plugin.dispatch import Op, Route

try:
    from torch._C._dynamo import guards as dynamo_guards
except ImportError:
    dynamo_guards = None  # type: ignore[assignment]

#: What a guard cannot ask, because it asks of one tensor at a time.
Agreement = Callable[[tuple[Any, ...]], bool]

#: A model has few signatures an op; the latest ones are kept.
MOST_PLANS = 8


@dataclass(frozen=True)
class Plan:
    """One recognised signature: which tensors are given, what guards them, and what the other arguments are.

    The guards ask whether a tensor requires a gradient, and not whether gradients are recorded: `unrecorded` says that
    they were not, where one does.
    """

    given: tuple[int, ...]
    missing: tuple[int, ...]
    unrecorded: bool
    recognises: Callable[..., bool]
    agree: Agreement | None
    rest: tuple[Any, ...]
    route: Route


def guard(tensors: list[Tensor], by_row: list[bool]) -> Callable[..., bool] | None:
    """A check for tensors like these; those that go `by_row` may have any first size."""
    sizes = [
        [None if rows and t.dim() > 1 and i == 0 else n for i, n in enumerate(t.shape)]
        for t, rows in zip(tensors, by_row, strict=True)
    ]
    strides = [list(t.stride()) for t in tensors]
    try:
        guards: Any = dynamo_guards.TensorGuards
        check: Callable[..., bool] = guards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
        return check if check(*tensors) else None
    except (AttributeError, TypeError, ValueError, RuntimeError):  # another torch, with other guards or none
        return None


def agreement(op: Op, given: tuple[int, ...]) -> Agreement | None:
    """check_shapes and check_disjoint for tensors whose sizes are known to agree but for the first.

    An empty tensor has no address of its own, so it takes the ordinary road.
    """
    x = op.x
    if op.one_a_row:
        rows = [i for i in given if op.by_row[i]]
        return lambda t: all(t[i].shape[:-1] == t[x].shape[:-1] for i in rows)
    alike = [i for i in op.alike if i in given]
    apart = [i for i in op.written if i in given] if len(op.written) > 1 else []
    if len(apart) < 2:
        if not alike:
            return None
        if len(alike) == 1:  # nearly every call: a loop takes twice as long
            other = alike[0]
            return lambda t: t[other].numel() == t[x].numel()
        return lambda t: all(t[i].numel() == t[x].numel() for i in alike)
    first, second = apart
    if len(alike) == 1:
        other = alike[0]
        return lambda t: t[other].numel() == t[x].numel() and t[first].data_ptr() != t[second].data_ptr()
    return lambda t: all(t[i].numel() == t[x].numel() for i in alike) and t[first].data_ptr() != t[second].data_ptr()


def remember(op: Op, tensors: tuple[Tensor | None, ...], rest: tuple[Any, ...], route: Route) -> None:
    """Recognise this signature from now on."""
    given = tuple(i for i, t in enumerate(tensors) if t is not None)
    present = [t for t in tensors if t is not None]
    recognises = guard(present, [op.by_row[i] for i in given])
    if recognises is not None:
        missing = tuple(i for i in range(len(tensors)) if i not in given)
        unrecorded = any(t.requires_grad for t in present)
        op.plans.append(Plan(given, missing, unrecorded, recognises, agreement(op, given), rest, route))
        del op.plans[:-MOST_PLANS]


def find(op: Op, tensors: tuple[Tensor | None, ...], rest: tuple[Any, ...]) -> Route | None:
    """The route of a recognised call, or None."""
    for plan in op.plans:
        if plan.rest != rest or (plan.unrecorded and torch.is_grad_enabled()):
            continue
        try:
            if plan.missing:
                if any_given(tensors, plan.missing) or not plan.recognises(*[tensors[i] for i in plan.given]):
                    continue
            elif not plan.recognises(*tensors):
                continue
        except TypeError:  # None, where the plan has a tensor
            continue
        if plan.agree is None or plan.agree(tensors):
            found: Route = plan.route
            return found
    return None


def any_given(tensors: tuple[Tensor | None, ...], places: tuple[int, ...]) -> bool:
    """Whether one of these places holds a tensor."""
    for i in places:  # noqa: SIM110 - a generator costs more than the loop
        if tensors[i] is not None:
            return True
    return False
