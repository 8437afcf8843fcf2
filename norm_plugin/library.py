"""Declares ops in torch.library, and gives them gradients.

Traced, transformed and differentiated code calls `torch.ops.norm_plugin.*`, which ends in `dispatch.call`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import Library
from torch.utils._pytree import tree_leaves

from norm_plugin import checks, dispatch
from norm_plugin.checks import Call
from norm_plugin.native.rms import new_output
from norm_plugin.numerics import Numerics
from norm_plugin.op import Op

LIBRARY = Library("norm_plugin", "DEF")

Arguments = dict[str, Any]
Tensors = tuple[Tensor | None, ...]


def declare(
    ops: dict[str, Op],
    native: Callable[..., Any],
    *,
    fake: Callable[[Arguments], Any] | None = None,
    normalized: str,
    by_element: str = "",
    one_a_row: str = "",
    shared: str = "",
    written: str = "",
    may_be: str = "",
    numerics: Mapping[str, Numerics] | None = None,
) -> Op:
    """Defines the op that `native` computes, with its name and signature, and enters it in `ops`. The module of
    `native` and the module of its kernel have one name, the kind of the op.

    normalized, by_element, one_a_row, shared: the tensors in each role. A tensor is normalized, has the same shape,
        has one number for each row, or is shared by all rows. Several names are one string, as in "weight bias".
    written: the arguments that are written in place, in the order of the arguments
    may_be: an argument that is written, and the one whose memory it may be, as in "out input"
    numerics: the table of the numerics that the op knows
    fake: makes outputs of the right shape and dtype from the named arguments. Without it the output is like the
        normalized tensor, or there is none if `native` returns none.
    """
    name = native.__name__
    parameters = inspect.signature(native).parameters
    arguments = tuple(parameters)
    schema = schema_of(native, written.split())
    parsed = torch._C.parse_schema(f"norm_plugin::{schema}")
    tensors = frozenset(a.name for a in parsed.arguments if "Tensor" in str(a.type))
    roles = f"{normalized} {by_element} {one_a_row} {shared}".split()
    if sorted(roles) != sorted(tensors):
        raise TypeError(
            f"{name} has the tensors {', '.join(sorted(tensors))} and roles for {', '.join(sorted(roles))}; "
            "each tensor must have one role."
        )
    rules = {
        **dict.fromkeys(by_element.split(), Call.per_element),
        **dict.fromkeys(one_a_row.split(), Call.per_row),
        **dict.fromkeys(shared.split(), Call.per_column),
        **{argument: rule for argument, rule in checks.RULES.items() if argument in arguments},
    }
    ruleless = {normalized, *(a.name for a in parsed.arguments if "bool" in str(a.type))}  # Call.check checks the first
    if unknown := sorted({*arguments} - {*rules} - ruleless):
        raise TypeError(f"{name} has arguments that checks.RULES has no rule for: {', '.join(unknown)}. Add one.")
    if ("numerics" in arguments) != (numerics is not None):
        raise TypeError(f"{name} must have an argument `numerics` and declare the table of those it knows, or neither.")

    def places(names: str) -> tuple[int, ...]:
        return tuple(map(arguments.index, names.split()))

    op = ops[name] = Op(
        name,
        native.__module__.rpartition(".")[2],
        native,
        arguments,
        defaults=tuple(None if p.default is p.empty else p.default for p in parameters.values()),
        rules=rules,
        x=arguments.index(normalized),
        by_element=places(by_element),
        one_a_row=places(one_a_row),
        written=places(written),
        tensors=tensors,
        required=frozenset(a.name for a in parsed.arguments if not str(a.type).startswith("Optional")),
        may_be=places(may_be),
        numerics=numerics or {},
    )
    LIBRARY.define(schema)
    getattr(torch.ops.norm_plugin, name)  # dir(torch.ops.norm_plugin) lists only ops that were looked up

    def run(*args: Any) -> Any:
        args = op.complete(args)
        if forward_ad._current_level >= 0:  # torch would take a missing formula for a derivative of 0
            raise NotImplementedError(
                f"torch.ops.norm_plugin.{op.name} has no formula for forward-mode differentiation; "
                "call the function of norm_plugin instead, which has one."
            )
        return dispatch.call(op, *args)

    def run_fake(*args: Any) -> Any:
        args = op.complete(args)
        checks.check(op, args)
        if fake is not None:
            return fake(dict(zip(arguments, args, strict=True)))
        return new_output(args[op.x]) if parsed.returns else None

    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"norm_plugin::{name}", run_fake, lib=LIBRARY)
    return op


#: The types that a schema has other words for.
TYPES = {
    "int": "SymInt",
    "torch.dtype": "ScalarType",
    "None": "()",
    "tuple[Tensor, Tensor]": "(Tensor, Tensor)",
    "list[Tensor]": "Tensor[]",
}


def schema_of(native: Callable[..., Any], written: list[str]) -> str:
    """The schema of a typed function. What it writes is marked (a!), (b!), in the order of the arguments.

    torch.library.infer_schema writes the same, and makes every import of norm_plugin a tenth slower.
    """
    signature, listed = inspect.signature(native), []
    marks = {name: f"({chr(ord('a') + place)}!)" for place, name in enumerate(written)}
    for name, p in signature.parameters.items():
        annotated, optional, _ = p.annotation.partition(" | None")
        default = f'"{p.default}"' if isinstance(p.default, str) else str(p.default).removeprefix("torch.")
        shown = f"{TYPES.get(annotated, annotated)}{marks.get(name, '')}{'?' if optional else ''} {name}"
        listed.append(shown if p.default is p.empty else f"{shown}={default}")
    returned = signature.return_annotation
    return f"{native.__name__}({', '.join(listed)}) -> {TYPES.get(returned, returned)}"


#: Returns the gradients of the first arguments of an op, which are tensors. It gets the tensors that were kept, which
#: gradients are wanted, the constants, and the gradients of the outputs (None for an output without one).
Backward = Callable[..., Tensors]


def differentiable(op: Op, keep: Callable[..., Tensors], backward: Backward, *constants: str) -> None:
    """Gives `op` a gradient, `backward(kept, wanted, *constants, *grads)`. `keep(inputs, output)` returns the tensors
    that it needs; `constants` are the names of the other arguments that it needs."""
    places = tuple(map(op.arguments.index, constants))

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        inputs = op.complete(inputs)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*keep(inputs, output))
        ctx.constants = [inputs[i] for i in places]
        ctx.dtypes = [t.dtype if isinstance(t, Tensor) else None for t in inputs]

    def differentiate(ctx: Any, *grads: Any) -> Tensors:
        wanted = ctx.needs_input_grad
        given = any(g is not None for g in tree_leaves(grads))
        found = backward(ctx.saved_tensors, wanted, *ctx.constants, *grads) if given else ()
        typed = [
            g.to(dtype) if need and g is not None else None
            for g, dtype, need in zip(found, ctx.dtypes, wanted, strict=False)
        ]
        return *typed, *[None] * (len(wanted) - len(typed))

    torch.library.register_autograd(f"norm_plugin::{op.name}", differentiate, setup_context=setup_context, lib=LIBRARY)
