"""Declarations of ops: their schemas stay as they were released, and incomplete ones are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from norm_plugin import library
from norm_plugin.gradients import BACKWARD_OPS
from norm_plugin.numerics import NUMERICS
from norm_plugin.op import Op
from norm_plugin.ops import OPS

_RMS = 'float eps=1e-6, str numerics="fp32", bool gemma=False, SymInt? variance_size=None, bool? enable_pdl=None'
_QUANT = 'str numerics="fp32", bool gemma=False, bool? enable_pdl=None'

#: Saved graphs contain these schemas: an argument may be added at the end, and nothing else may change.
SCHEMAS = (
    f"rmsnorm(Tensor input, Tensor? weight, {_RMS}) -> Tensor",
    f"rmsnorm_out(Tensor input, Tensor? weight, Tensor(a!) out, {_RMS}) -> ()",
    f"add_rmsnorm(Tensor input, Tensor residual, Tensor? weight, {_RMS}) -> (Tensor, Tensor)",
    f"fused_add_rmsnorm(Tensor(a!) input, Tensor(b!) residual, Tensor? weight, {_RMS}) -> ()",
    "l2norm(Tensor input, float eps=1e-6, ScalarType? output_dtype=None) -> Tensor",
    'layernorm(Tensor input, Tensor? weight, Tensor? bias, float eps=1e-6, str numerics="fp32") -> Tensor',
    "layernorm_linear(Tensor x, Tensor? weight, Tensor? bias, Tensor linear_weight, Tensor? linear_bias, "
    "float eps=1e-6) -> Tensor",
    "gated_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor? z=None, float eps=1e-6, SymInt? group_size=None, "
    'bool norm_before_gate=True, bool is_rms_norm=False, str activation="silu", str numerics="fp32") -> Tensor',
    'split_sums(Tensor x, Tensor? z, str numerics="fp32") -> Tensor',
    "split_rmsnorm(Tensor x, Tensor? weight, Tensor? z, Tensor sums, SymInt full_width, float eps=1e-6, "
    'str numerics="fp32") -> Tensor',
    f"rmsnorm_quant(Tensor(a!) out, Tensor input, Tensor? weight, Tensor scale, float eps=1e-6, {_QUANT}) -> ()",
    "fused_add_rmsnorm_quant(Tensor(a!) out, Tensor input, Tensor(b!) residual, Tensor? weight, Tensor scale, "
    f"float eps=1e-6, {_QUANT}) -> ()",
    "rmsnorm_dynamic_quant(Tensor input, Tensor? weight, Tensor(a!)? residual=None, Tensor? scale_ub=None, "
    f"float eps=1e-6, ScalarType quant_dtype=float8_e4m3fn, {_QUANT}) -> (Tensor, Tensor)",
    "rmsnorm_block_quant(Tensor input, Tensor? weight, Tensor(a!)? residual=None, float eps=1e-6, "
    f"SymInt group_size=128, ScalarType quant_dtype=float8_e4m3fn, {_QUANT}) -> (Tensor, Tensor)",
    "layernorm_quant(Tensor(a!) out, Tensor input, Tensor? weight, Tensor? bias, Tensor scale, float eps=1e-6, "
    'str numerics="fp32") -> ()',
    "rmsnorm_backward(Tensor grad, Tensor input, Tensor? weight, Tensor? residual_grad=None, float eps=1e-6, "
    "bool gemma=False, SymInt? variance_size=None, bool weight_grad=True) -> Tensor[]",
    "l2norm_backward(Tensor grad, Tensor input, float eps=1e-6) -> Tensor",
    "layernorm_backward(Tensor grad, Tensor input, Tensor? weight, Tensor? bias, float eps=1e-6, "
    "bool weight_grad=True, bool bias_grad=True) -> Tensor[]",
    "gated_norm_backward(Tensor grad, Tensor x, Tensor? weight, Tensor? bias, Tensor? z=None, float eps=1e-6, "
    'SymInt? group_size=None, bool norm_before_gate=True, bool is_rms_norm=False, str activation="silu", '
    "bool weight_grad=True, bool bias_grad=True) -> Tensor[]",
)


def test_the_schemas_are_those_that_were_released() -> None:
    found = [str(getattr(torch.ops.norm_plugin, name).default._schema) for name in (*OPS, *BACKWARD_OPS)]
    assert found == [str(torch._C.parse_schema(f"norm_plugin::{schema}")) for schema in SCHEMAS]


@pytest.mark.parametrize("op", [*OPS.values(), *BACKWARD_OPS.values()], ids=lambda op: op.name)
def test_the_native_function_takes_all_arguments(op: Op) -> None:
    """A default that torch leaves out is filled in, with the type of its argument."""
    schema = getattr(torch.ops.norm_plugin, op.name).default._schema
    for argument, default in zip(schema.arguments, op.defaults, strict=True):
        kind = str(argument.real_type)
        assert isinstance(default, torch.dtype) if kind == "ScalarType" else default == argument.default_value


# --- declarations that are refused --------------------------------------------------------------------------------


def toy(input: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    return input


def toy_of_height(input: Tensor, height: float) -> Tensor:
    return input


def toy_with_numerics(input: Tensor, numerics: str = "fp32") -> Tensor:
    return input


ONE_ROLE = "each tensor must have one role."


@pytest.mark.parametrize(
    ("native", "declared", "message"),
    [
        (toy, {}, f"toy has the tensors input, weight and roles for input; {ONE_ROLE}"),
        (
            toy,
            {"shared": "weight eps"},
            f"toy has the tensors input, weight and roles for eps, input, weight; {ONE_ROLE}",
        ),
        (
            toy,
            {"shared": "weight", "by_element": "weight"},
            f"toy has the tensors input, weight and roles for input, weight, weight; {ONE_ROLE}",
        ),
        (toy_of_height, {}, "toy_of_height has arguments that checks.RULES has no rule for: height. Add one."),
        (
            toy_with_numerics,
            {},
            "toy_with_numerics must have an argument `numerics` and declare the table of those it knows, or neither.",
        ),
        (
            toy,
            {"shared": "weight", "numerics": NUMERICS},
            "toy must have an argument `numerics` and declare the table of those it knows, or neither.",
        ),
    ],
)
def test_a_declaration_that_leaves_something_open_is_refused(
    native: Callable[..., Any], declared: dict[str, Any], message: str
) -> None:
    ops: dict[str, Op] = {}
    with pytest.raises(TypeError) as raised:
        library.declare(ops, native, normalized="input", **declared)
    assert str(raised.value) == message
    assert not ops
    assert native.__name__ not in dir(torch.ops.norm_plugin)
