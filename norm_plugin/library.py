"""Ops in torch.library: how one is defined, and its call through dispatch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import Library
from torch.utils._pytree import tree_leaves

from norm_plugin import dispatch
from norm_plugin.checks import ALIKE, ONE_A_ROW, RULES, SHARED_BY_ROWS
from norm_plugin.dispatch import Op

LIBRARY = Library("norm_plugin", "DEF")

Arguments = dict[str, Any]


def register(
    schema: str,
    family: str,
    native: Callable[..., Any],
    fake: Callable[[Arguments], Any],
    x: str = "input",
    in_place: tuple[str, str] | None = None,
) -> Op:
    """Define an op. `fake` makes outputs of the right shape and dtype from the named arguments; `in_place` names the
    argument that is written and the one that it may be."""
    parsed = torch._C.parse_schema(f"norm_plugin::{schema}").arguments
    name = schema.partition("(")[0]
    arguments = tuple(a.name for a in parsed)
    if unknown := [argument for argument in arguments if argument not in RULES]:
        raise TypeError(f"{name} has arguments that checks.RULES has no rule for: {', '.join(unknown)}. Add one.")
    by_row = (x, *ALIKE, *ONE_A_ROW, *SHARED_BY_ROWS)
    tensors = frozenset(a.name for a in parsed if "Tensor" in str(a.type))
    if unknown := [argument for argument in tensors if argument not in by_row]:
        raise TypeError(f"{name} has tensors of which nobody says how they go with rows: {', '.join(unknown)}.")
    LIBRARY.define(schema)
    getattr(torch.ops.norm_plugin, name)  # dir(torch.ops.norm_plugin) lists what was asked for
    if "enable_pdl" in arguments:  # how a kernel is launched means nothing to the native op
        native = _without_last(native)
    op = Op(
        name,
        family,
        native,
        arguments,
        defaults=tuple(map(_default, parsed)),
        x=arguments.index(x),
        alike=tuple(i for i, argument in enumerate(arguments) if argument in ALIKE),
        one_a_row=tuple(i for i, argument in enumerate(arguments) if argument in ONE_A_ROW),
        written=tuple(i for i, a in enumerate(parsed) if a.alias_info is not None and a.alias_info.is_write),
        tensors=tensors,
        required=frozenset(a.name for a in parsed if not str(a.type).startswith("Optional")),
        in_place=None if in_place is None else (arguments.index(in_place[0]), arguments.index(in_place[1])),
    )

    def run(*args: Any) -> Any:
        args = op.complete(args)
        if forward_ad._current_level >= 0:  # torch would take a derivative without a formula for zero
            raise NotImplementedError(
                f"torch.ops.norm_plugin.{op.name} has no formula for forward-mode differentiation; "
                "call the function of norm_plugin instead, which has one."
            )
        return dispatch.call(op, *args)

    def run_fake(*args: Any) -> Any:
        args = op.complete(args)
        op.check(args)
        return fake(dict(zip(arguments, args, strict=True)))

    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"norm_plugin::{name}", run_fake, lib=LIBRARY)
    return op


def _default(argument: Any) -> Any:
    """The default of an argument, or None. A schema holds a dtype as its number, which only an ATen call can read."""
    if not argument.has_default_value():
        return None
    value = argument.default_value
    if str(argument.real_type) == "ScalarType" and value is not None:
        return torch.ops.aten.empty.memory_format([0], dtype=value).dtype
    return value


def _without_last(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: function(*args[:-1])


#: The gradients of the arguments of an op, from the saved tensors, the saved constants, what is wanted, and the
#: gradients of the outputs, which are None where an output has none.
Backward = Callable[..., tuple[Tensor | None, ...]]


Saved = Callable[..., tuple[Tensor | None, ...]]


def differentiable(op: Op, saved: Saved, backward: Backward, *constants: str) -> None:
    """Give `op` a gradient. `saved(inputs, output)` are the tensors that it needs, and `constants` the other arguments;
    `backward(tensors, wanted, *constants, *grads)` answers for the first arguments of the op, which are tensors."""
    places = tuple(map(op.arguments.index, constants))

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        inputs = op.complete(inputs)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*saved(inputs, output))
        ctx.constants = [inputs[i] for i in places]
        ctx.dtypes = [t.dtype if isinstance(t, Tensor) else None for t in inputs]

    def differentiate(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad
        given = any(g is not None for g in tree_leaves(grads))
        found = backward(ctx.saved_tensors, wanted, *ctx.constants, *grads) if given else ()
        typed = [
            g.to(dtype) if need and g is not None else None
            for g, dtype, need in zip(found, ctx.dtypes, wanted, strict=False)
        ]
        return *typed, *[None] * (len(wanted) - len(typed))

    torch.library.register_autograd(f"norm_plugin::{op.name}", differentiate, setup_context=setup_context, lib=LIBRARY)
