"""The ops in torch.library: schema, fake, autograd, and the call through dispatch.

`torch.ops.norm_plugin.*` is the door for traced and differentiated code; `functions.py` takes the direct one where
only values are wanted. Both end in `dispatch.call`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from norm_plugin import dispatch
from norm_plugin.checks import ALIKE
from norm_plugin.dispatch import Op
from norm_plugin.native import gated, layer, quant, rms

LIBRARY = Library("norm_plugin", "DEF")
OPS: dict[str, Op] = {}

Arguments = dict[str, Any]


def _register(
    schema: str, family: str, native: Callable[..., Any], fake: Callable[[Arguments], Any], x: str = "input"
) -> Op:
    """Define an op. `fake` makes outputs of the right shape, dtype and strides from the named arguments."""
    name = LIBRARY.define(schema)
    parsed = getattr(torch.ops.norm_plugin, name).default._schema.arguments
    arguments = tuple(a.name for a in parsed)
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
        written=tuple(i for i, a in enumerate(parsed) if a.alias_info is not None and a.alias_info.is_write),
    )

    def run(*args: Any) -> Any:
        return dispatch.call(op, *op.complete(args))

    def run_fake(*args: Any) -> Any:
        args = op.complete(args)
        op.check(args)
        return fake(dict(zip(arguments, args, strict=True)))

    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"norm_plugin::{name}", run_fake, lib=LIBRARY)
    OPS[name] = op
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


def _differentiable(
    op: Op, tensors: int, constants: tuple[str, ...], backward: Callable[..., tuple[Tensor | None, ...]]
) -> None:
    """Give `op` a gradient: `backward(tensors, constants, *grads)` answers for its first `tensors` arguments."""
    places = tuple(map(op.arguments.index, constants))

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        inputs = op.complete(inputs)
        ctx.save_for_backward(*inputs[:tensors])
        ctx.constants = [inputs[i] for i in places]

    def differentiate(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        found = backward(ctx.saved_tensors, ctx.constants, *grads)
        wanted = zip(found, ctx.saved_tensors, ctx.needs_input_grad, strict=False)
        typed = [g.to(t.dtype) if need and g is not None else None for g, t, need in wanted]
        return *typed, *[None] * (len(ctx.needs_input_grad) - len(typed))

    torch.library.register_autograd(f"norm_plugin::{op.name}", differentiate, setup_context=setup_context, lib=LIBRARY)


def _nothing(a: Arguments) -> None:
    """The fake of an op that only writes its arguments."""


# --- rms ----------------------------------------------------------------------------------------------------------

_RMS = 'float eps=1e-6, str numerics="fp32", bool gemma=False, SymInt? variance_size=None, bool? enable_pdl=None'


def _rmsnorm_out(
    input: Tensor, weight: Tensor | None, out: Tensor, eps: float, numerics: str, gemma: bool, variance_size: int | None
) -> None:
    out.copy_(rms.rmsnorm(input, weight, eps, numerics, gemma, variance_size))


RMSNORM = _register(
    f"rmsnorm(Tensor input, Tensor? weight, {_RMS}) -> Tensor",
    "rms",
    rms.rmsnorm,
    lambda a: torch.empty_like(a["input"]),
)
RMSNORM_OUT = _register(
    f"rmsnorm_out(Tensor input, Tensor? weight, Tensor(a!) out, {_RMS}) -> ()", "rms", _rmsnorm_out, _nothing
)
ADD_RMSNORM = _register(
    f"add_rmsnorm(Tensor input, Tensor residual, Tensor? weight, {_RMS}) -> (Tensor, Tensor)",
    "rms",
    rms.add_rmsnorm,
    lambda a: (torch.empty_like(a["input"]), torch.empty_like(a["residual"])),
)
FUSED_ADD_RMSNORM = _register(
    f"fused_add_rmsnorm(Tensor(a!) input, Tensor(b!) residual, Tensor? weight, {_RMS}) -> ()",
    "rms",
    rms.fused_add_rmsnorm,
    _nothing,
)
L2NORM = _register(
    "l2norm(Tensor input, float eps=1e-6, ScalarType? output_dtype=None) -> Tensor",
    "rms",
    rms.l2norm,
    lambda a: torch.empty_like(a["input"], dtype=a["output_dtype"]),
)


def _rmsnorm_backward(tensors: Any, constants: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, weight = tensors
    return rms.rmsnorm_backward(grad, rms.wide(input), weight, *constants)


def _add_rmsnorm_backward(
    tensors: Any, constants: Any, grad: Tensor, new_residual_grad: Tensor
) -> tuple[Tensor | None, ...]:
    input, residual, weight = tensors
    dh, dweight = rms.rmsnorm_backward(grad, rms.wide(input) + rms.wide(residual), weight, *constants)
    dh = dh + new_residual_grad
    return dh, dh, dweight


def _l2norm_backward(tensors: Any, constants: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (rms.l2norm_backward(grad, tensors[0], *constants),)


_differentiable(RMSNORM, 2, ("eps", "gemma", "variance_size"), _rmsnorm_backward)
_differentiable(ADD_RMSNORM, 3, ("eps", "gemma", "variance_size"), _add_rmsnorm_backward)
_differentiable(L2NORM, 1, ("eps",), _l2norm_backward)

# --- layer --------------------------------------------------------------------------------------------------------

LAYERNORM = _register(
    'layernorm(Tensor input, Tensor? weight, Tensor? bias, float eps=1e-6, str numerics="fp32") -> Tensor',
    "layer",
    layer.layernorm,
    lambda a: torch.empty_like(a["input"]),
)
LAYERNORM_LINEAR = _register(
    "layernorm_linear(Tensor x, Tensor? weight, Tensor? bias, Tensor linear_weight, Tensor? linear_bias, "
    "float eps=1e-6) -> Tensor",
    "layer",
    layer.layernorm_linear,
    lambda a: a["linear_weight"].new_empty((*a["x"].shape[:-1], a["linear_weight"].shape[0])),
    x="x",
)


def _layernorm_backward(tensors: Any, constants: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, weight, _bias = tensors
    return layer.layernorm_backward(grad, input, weight, *constants)


def _layernorm_linear_backward(tensors: Any, constants: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return layer.layernorm_linear_backward(grad, *tensors[:4], *constants)


_differentiable(LAYERNORM, 3, ("eps",), _layernorm_backward)
_differentiable(LAYERNORM_LINEAR, 5, ("eps",), _layernorm_linear_backward)

# --- gated --------------------------------------------------------------------------------------------------------

GATED_NORM = _register(
    "gated_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor? z=None, float eps=1e-6, SymInt? group_size=None, "
    'bool norm_before_gate=True, bool is_rms_norm=False, str activation="silu", str numerics="fp32") -> Tensor',
    "gated",
    gated.gated_norm,
    lambda a: torch.empty_like(a["x"]),
    x="x",
)


def _gated_norm_backward(tensors: Any, constants: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return gated.gated_norm_backward(grad, *tensors, *constants)


_differentiable(
    GATED_NORM, 4, ("eps", "group_size", "norm_before_gate", "is_rms_norm", "activation"), _gated_norm_backward
)

# --- quant --------------------------------------------------------------------------------------------------------

_QUANT = 'str numerics="fp32", bool gemma=False, bool? enable_pdl=None'


def _quantised(a: Arguments, scales: int) -> tuple[Tensor, Tensor]:
    x = a["input"]
    scale = x.new_empty((*x.shape[:-1], scales), dtype=rms.wide_dtype(x.dtype))
    return torch.empty_like(x, dtype=a["quant_dtype"]), scale


RMSNORM_QUANT = _register(
    f"rmsnorm_quant(Tensor(a!) out, Tensor input, Tensor? weight, Tensor scale, float eps=1e-6, {_QUANT}) -> ()",
    "quant",
    quant.rmsnorm_quant,
    _nothing,
)
FUSED_ADD_RMSNORM_QUANT = _register(
    "fused_add_rmsnorm_quant(Tensor(a!) out, Tensor input, Tensor(b!) residual, Tensor? weight, Tensor scale, "
    f"float eps=1e-6, {_QUANT}) -> ()",
    "quant",
    quant.fused_add_rmsnorm_quant,
    _nothing,
)
RMSNORM_DYNAMIC_QUANT = _register(
    "rmsnorm_dynamic_quant(Tensor input, Tensor? weight, Tensor(a!)? residual=None, Tensor? scale_ub=None, "
    f"float eps=1e-6, ScalarType quant_dtype=float8_e4m3fn, {_QUANT}) -> (Tensor, Tensor)",
    "quant",
    quant.rmsnorm_dynamic_quant,
    lambda a: _quantised(a, 1),
)
RMSNORM_BLOCK_QUANT = _register(
    "rmsnorm_block_quant(Tensor input, Tensor? weight, Tensor(a!)? residual=None, float eps=1e-6, "
    f"SymInt group_size=128, ScalarType quant_dtype=float8_e4m3fn, {_QUANT}) -> (Tensor, Tensor)",
    "quant",
    quant.rmsnorm_block_quant,
    lambda a: _quantised(a, a["input"].shape[-1] // a["group_size"]),
)
LAYERNORM_QUANT = _register(
    "layernorm_quant(Tensor(a!) out, Tensor input, Tensor? weight, Tensor? bias, Tensor scale, float eps=1e-6) -> ()",
    "quant",
    quant.layernorm_quant,
    _nothing,
)
