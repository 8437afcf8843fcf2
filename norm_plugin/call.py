"""The road of a call, from a public function to what computes it.

    functions     have the signatures that people call
    call          sends a recognised call straight to its route, and any other call down one of three roads:
                  dispatch (only values are wanted), torch.ops (traced or differentiated), the native op (torch.func)
    dispatch      checks a new signature, finds its route and counts; `torch.ops.norm_plugin` ends here too
    kernels or native compute

`shortcut` makes the plans by which a call is recognised, once a call of its signature has run on Triton.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from norm_plugin import checks, dispatch, shortcut
from norm_plugin.dispatch import Route
from norm_plugin.op import Op
from norm_plugin.shortcut import Placed

_is_traced = torch.compiler.is_dynamo_compiling  # a global: to find it in torch would take as long as the call


def call(op: Op, tensors: tuple[Tensor | None, ...], rest: tuple[Any, ...], decline: bool = False) -> Any:
    """Does `op` on its tensors and its other arguments, by the shortest road that is right.

    `decline`: if a kernel was asked for and none can do the call, raise dispatch.Declined and write nothing.
    """
    if not _is_traced() and forward_ad._current_level < 0:
        known = recognise(op, tensors, rest)
        if known is not None:
            route, agreed = known
            if route.writes:
                dispatch.advance_versions(route.written(tensors))
            route.calls += 1
            try:
                if route.at is not None and route.at(agreed, rest):
                    return None
                return route.run(*tensors, *rest)
            except Exception as error:
                return dispatch.after_failure(route, error, (*tensors, *rest), decline)
    args = (*tensors, *rest)
    if _is_derived():
        return dispatch.run(dispatch.find_native(op, args, "torch.func or forward-mode differentiation"), args)
    if op.written and _needs_grad(*tensors):
        return _write_recorded(op, args)
    if not _only_values(*tensors):
        if op.written and not torch.compiler.is_compiling():
            args = (*_resolved(op, tensors), *rest)
        return getattr(torch.ops.norm_plugin, op.name)(*args)
    route = dispatch.find_route(op, args)
    result = dispatch.run(route, args, decline)
    if route.backend == "triton" and route.proven:
        shortcut.remember(op, tensors, rest, route)
    return result


def recognise(
    op: Op, tensors: tuple[Tensor | None, ...], rest: tuple[Any, ...]
) -> tuple[Route, Literal[True] | Placed] | None:
    """(route, what its plan agreed on), or None if no plan recognises the call."""
    for plan in op.plans:
        if plan.rest != rest or (plan.unrecorded and torch.is_grad_enabled()):
            continue
        try:
            if plan.missing:
                if _any_given(tensors, plan.missing) or not plan.recognises(*[tensors[i] for i in plan.given]):
                    continue
            elif not plan.recognises(*tensors):
                continue
        except TypeError:  # None in the place of a tensor
            continue
        agreed = plan.agree is None or plan.agree(tensors)
        if agreed:
            return plan.route, agreed
    return None


def _any_given(tensors: tuple[Tensor | None, ...], places: tuple[int, ...]) -> bool:
    """Whether there is a tensor in one of these places."""
    for i in places:  # noqa: SIM110 - a generator costs more than the loop
        if tensors[i] is not None:
            return True
    return False


_PLAIN = (Tensor, Parameter)


def _needs_grad(*tensors: Tensor | None) -> bool:
    if torch.is_grad_enabled():
        for t in tensors:
            if getattr(t, "requires_grad", False):  # torch's schema refuses later what is no tensor
                return True
    return False


def _only_values(*tensors: Tensor | None) -> bool:
    """Whether a call on these tensors is not traced, transformed or differentiated, and their values lie in memory."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    ):
        return False
    return all(t is None or _is_plain(t) for t in tensors) and not _needs_grad(*tensors)


def _is_plain(t: Tensor) -> bool:
    """Whether the values of t lie in memory. torch's dispatcher handles negative bits, lazy zeros and meta tensors."""
    return type(t) in _PLAIN and not (t.is_neg() or t._is_zerotensor() or t.is_meta)


def _is_derived() -> bool:
    """Whether torch.func or forward mode differentiates the call. The ops have no formulas for these."""
    if torch.compiler.is_compiling():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return any(transform.key() in _DERIVING for transform in torch._C._functorch.get_interpreter_stack() or ())
    return forward_ad._current_level >= 0


_DERIVING = (torch._C._functorch.TransformType.Grad, torch._C._functorch.TransformType.Jvp)


def _resolved(op: Op, tensors: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """The tensors without negative bits. torch resolves these bits only for ops that return what they write."""
    for i in op.written:
        t = tensors[i]
        if isinstance(t, Tensor) and t.is_neg():
            name = op.arguments[i]
            raise ValueError(f"{name} has the negative bit, and it is written in place; pass {name}.resolve_neg().")
    return [t.resolve_neg() if isinstance(t, Tensor) else t for t in tensors]


def _write_recorded(op: Op, args: tuple[Any, ...]) -> Any:
    """Does an op that writes while gradients are recorded, after it has checked that every write is allowed."""
    checks.check(op, args)
    written = [(op.arguments[i], args[i]) for i in op.written if args[i] is not None]
    if not torch.compiler.is_compiling() and all(_is_plain(t) for _, t in written):  # others have no memory
        checks.check_memory(op, args)
        for name, t in written:
            checks.recorded_writing(name, t)
    if op.recorded is not None:
        return op.recorded(*args)
    for name, t in written:
        if t.requires_grad:
            raise RuntimeError(
                f"{name} requires a gradient, and {op.name}, which writes it, has none; call it under torch.no_grad()."
            )
    return getattr(torch.ops.norm_plugin, op.name)(*args)
