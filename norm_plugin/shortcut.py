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


def remember(op: Op, tensors: tuple[Tensor | None, ...], rest: tuple[Any, ...], route: Route) -> None:
    """Recognise this signature from now on."""
    given = tuple(i for i, t in enumerate(tensors) if t is not None)
    present = [t for t in tensors if t is not None]
    recognises = guard(present, [i == op.x or i in op.alike for i in given])
    if recognises is not None:
        missing = tuple(i for i in range(len(tensors)) if i not in given)
        unrecorded = any(t.requires_grad for t in present)
        op.plans.append(Plan(given, missing, unrecorded, recognises, rest, route))
        del op.plans[:-MOST_PLANS]


def find(op: Op, tensors: tuple[Tensor | None, ...], rest: tuple[Any, ...]) -> Route | None:
    """The route of a recognised call, or None."""
    for plan in op.plans:
        if plan.rest != rest or any_given(tensors, plan.missing) or (plan.unrecorded and torch.is_grad_enabled()):
            continue
        try:
            known = (
                plan.recognises(*tensors) if not plan.missing else plan.recognises(*[tensors[i] for i in plan.given])
            )
        except TypeError:  # None, where the plan has a tensor
            continue
        if known and op.agree(tensors):
            found: Route = plan.route
            return found
    return None


def any_given(tensors: tuple[Tensor | None, ...], places: tuple[int, ...]) -> bool:
    """Whether one of these places holds a tensor."""
    for i in places:  # noqa: SIM110 - a generator costs more than the loop
        if tensors[i] is not None:
            return True
    return False
