"""Bad input: the error names the argument, what it is and what it must be, and nothing was written before it.

Every case is tried through every entry (dispatch, torch.ops, and torch.ops under autograd), before and after a good
call of the same op, because a good call makes later calls skip some checks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import norm_plugin
from norm_plugin import dispatch
from norm_plugin.accuracy import inputs
from norm_plugin.numerics import GATED_NUMERICS, NUMERICS
from norm_plugin.op import Op
from norm_plugin.ops import OPS
from tests.spec import samples

SHAPE = (3, 48)
BF16 = torch.bfloat16


class Bad(NamedTuple):
    """A call that must be refused: the op, the arguments that are wrong, the error and its whole message."""

    op: str
    wrong: samples.Arguments
    error: type[Exception]
    message: str


def spread(dtype: torch.dtype) -> Tensor:
    """A last stride of 2."""
    return torch.zeros(3, 96, dtype=dtype)[:, ::2]


def one_row(dtype: torch.dtype) -> Tensor:
    """One row, shown three times."""
    return torch.zeros(1, 48, dtype=dtype).expand(3, 48)


FLOATS = "float16, bfloat16, float32, float64"

BAD: dict[str, Bad] = {
    "sums in half precision": Bad(
        "split_rmsnorm", {"sums": torch.ones(3, 1, dtype=BF16)}, TypeError,
        "sums has dtype bfloat16; it must be float32. Cast it.",
    ),
    "sums of other rows": Bad(
        "split_rmsnorm", {"sums": torch.ones(2, 1)}, ValueError,
        "sums has shape [2, 1]; it must be [3, 1], one number a row of x.",
    ),
    "sums without their dimension": Bad(
        "split_rmsnorm", {"sums": torch.ones(3)}, ValueError,
        "sums has shape [3]; it must be [3, 1], one number a row of x.",
    ),
    "whole rows narrower than their part": Bad(
        "split_rmsnorm", {"full_width": 47}, ValueError,
        "full_width is 47; it must be at least 48, the last dimension of x.",
    ),
    "a gate of other rows": Bad(
        "split_sums", {"z": torch.ones(2, 48, dtype=BF16)}, ValueError,
        "z has shape [2, 48]; it must have the shape of x, [3, 48].",
    ),
    "x of integers": Bad(
        "rmsnorm", {"input": torch.ones(SHAPE, dtype=torch.int32)}, TypeError,
        f"input has dtype int32; it must be {FLOATS}. Cast it.",
    ),
    "x without dimensions": Bad(
        "l2norm", {"input": torch.tensor(1.0)}, ValueError,
        "input has shape []; it must have a last dimension, the one that is normalized, of at least one element.",
    ),
    "x without columns": Bad(
        "gated_norm", {"x": torch.ones(3, 0), "z": None, "weight": None, "bias": None}, ValueError,
        "x has shape [3, 0]; it must have a last dimension, the one that is normalized, of at least one element.",
    ),
    "weight of another width": Bad(
        "rmsnorm", {"weight": torch.ones(47)}, ValueError,
        "weight has shape [47]; it must be [48], the last dimension of input.",
    ),
    "weight of another rank": Bad(
        "rmsnorm_out", {"weight": torch.ones(1, 48), "out": torch.zeros(SHAPE, dtype=BF16)}, ValueError,
        "weight has shape [1, 48]; it must be [48], the last dimension of input.",
    ),
    "weight of integers": Bad(
        "add_rmsnorm", {"weight": torch.ones(48, dtype=torch.int64)}, TypeError,
        f"weight has dtype int64; it must be {FLOATS}. Cast it.",
    ),
    "weight on another device": Bad(
        "layernorm", {"weight": torch.ones(48, device="meta")}, ValueError,
        "weight is on meta and input on cpu; move weight to cpu.",
    ),
    "residual on another device": Bad(
        "fused_add_rmsnorm", {"residual": torch.ones(SHAPE, device="meta")}, ValueError,
        "residual is on meta and input on cpu; move residual to cpu.",
    ),
    "eps that is no number": Bad(
        "rmsnorm", {"eps": float("nan")}, ValueError, "eps is nan; it must be a finite number of at least 0.",
    ),
    "eps below zero": Bad(
        "layernorm", {"eps": -1e-6}, ValueError, "eps is -1e-06; it must be a finite number of at least 0.",
    ),
    "eps without end": Bad(
        "l2norm", {"eps": float("inf")}, ValueError, "eps is inf; it must be a finite number of at least 0.",
    ),
    "input that is written, its rows one over another": Bad(
        "fused_add_rmsnorm", {"input": torch.zeros(68, dtype=BF16).as_strided((3, 48), (10, 1))}, ValueError,
        "input has shape [3, 48] and strides [10, 1], so some of its elements are the same memory; it is written, so "
        "clone it first.",
    ),
    "bias of another width": Bad(
        "layernorm", {"bias": torch.ones(49)}, ValueError,
        "bias has shape [49]; it must be [48], the last dimension of input.",
    ),
    "unknown numerics": Bad(
        "fused_add_rmsnorm", {"numerics": "bf16"}, ValueError,
        f"numerics is 'bf16'; it must be one of {', '.join(NUMERICS)}.",
    ),
    "numerics that gated norms do not have": Bad(
        "gated_norm", {"numerics": "vllm_c"}, ValueError,
        f"numerics is 'vllm_c'; it must be one of {', '.join(GATED_NUMERICS)}.",
    ),
    "numerics of an RMSNorm for a LayerNorm that is quantised": Bad(
        "layernorm_quant", {"numerics": "hf"}, ValueError,
        "numerics is 'hf'; it must be one of fp32, flashinfer_layer.",
    ),
    "numerics of a LayerNorm that is not quantised": Bad(
        "layernorm_quant", {"numerics": "torch"}, ValueError,
        "numerics is 'torch'; it must be one of fp32, flashinfer_layer.",
    ),
    "numerics of a quantised LayerNorm for one that is not": Bad(
        "layernorm", {"numerics": "flashinfer_layer"}, ValueError,
        "numerics is 'flashinfer_layer'; it must be one of fp32, torch.",
    ),
    "numerics of a quantised LayerNorm for an RMSNorm": Bad(
        "rmsnorm_quant", {"numerics": "flashinfer_layer"}, ValueError,
        f"numerics is 'flashinfer_layer'; it must be one of {', '.join(NUMERICS)}.",
    ),
    "unknown activation": Bad(
        "gated_norm", {"activation": "gelu"}, ValueError,
        "activation is 'gelu'; it must be one of silu, swish, sigmoid.",
    ),
    "variance of too many columns": Bad(
        "rmsnorm", {"variance_size": 49}, ValueError,
        "variance_size is 49; it must lie in 1..48, the last dimension of input.",
    ),
    "variance of no columns": Bad(
        "add_rmsnorm", {"variance_size": 0}, ValueError,
        "variance_size is 0; it must lie in 1..48, the last dimension of input.",
    ),
    "groups that do not divide": Bad(
        "gated_norm", {"group_size": 7}, ValueError,
        "group_size is 7; it must divide the last dimension of x, 48.",
    ),
    "groups of nothing": Bad(
        "gated_norm", {"group_size": 0}, ValueError, "group_size is 0; it must divide the last dimension of x, 48.",
    ),
    "blocks that do not divide": Bad(
        "rmsnorm_block_quant", {"group_size": 32}, ValueError,
        "group_size is 32; it must divide the last dimension of input, 48.",
    ),
    "z of another shape": Bad(
        "gated_norm", {"z": torch.ones(4, 48)}, ValueError,
        "z has shape [4, 48]; it must have the shape of x, [3, 48].",
    ),
    "z of integers": Bad(
        "gated_norm", {"z": torch.ones(SHAPE, dtype=torch.int8)}, TypeError,
        f"z has dtype int8; it must be {FLOATS}. Cast it.",
    ),
    "residual of fewer rows": Bad(
        "fused_add_rmsnorm", {"residual": torch.ones(1, 48, dtype=BF16)}, ValueError,
        "residual has shape [1, 48]; it must have the shape of input, [3, 48].",
    ),
    "residual of another rank": Bad(
        "add_rmsnorm", {"residual": torch.ones(3, 1, 48)}, ValueError,
        "residual has shape [3, 1, 48]; it must have the shape of input, [3, 48].",
    ),
    "residual of integers": Bad(
        "rmsnorm_dynamic_quant", {"residual": torch.ones(SHAPE, dtype=torch.int16)}, TypeError,
        f"residual has dtype int16; it must be {FLOATS}. Cast it.",
    ),
    "residual that is written, expanded": Bad(
        "fused_add_rmsnorm", {"residual": one_row(BF16)}, ValueError,
        "residual is expanded (strides [0, 1]); it is written, so clone it first.",
    ),
    "input that is written, with gaps": Bad(
        "fused_add_rmsnorm", {"input": spread(BF16)}, ValueError,
        "input has strides [96, 2]; it is written, so its last stride must be 1.",
    ),
    "out of another dtype": Bad(
        "rmsnorm_out", {"out": torch.zeros(SHAPE)}, TypeError, "out has dtype float32; it must be bfloat16. Cast it.",
    ),
    "out of another shape": Bad(
        "rmsnorm_out", {"out": torch.zeros(2, 48, dtype=BF16)}, ValueError,
        "out has shape [2, 48]; it must have the shape of input, [3, 48].",
    ),
    "out with gaps": Bad(
        "rmsnorm_out", {"out": spread(BF16)}, ValueError,
        "out has strides [96, 2]; it is written, so its last stride must be 1.",
    ),
    "out, expanded": Bad(
        "rmsnorm_out", {"out": one_row(BF16)}, ValueError,
        "out is expanded (strides [0, 1]); it is written, so clone it first.",
    ),
    "out that is not quantised": Bad(
        "fused_add_rmsnorm_quant", {"out": torch.zeros(SHAPE)}, TypeError,
        "out has dtype float32; it must be float8_e4m3fn, float8_e5m2, int8. Cast it.",
    ),
    "scale of two elements": Bad(
        "rmsnorm_quant", {"scale": torch.ones(2)}, ValueError,
        "scale has shape [2]; it must hold exactly one element.",
    ),
    "scale of integers": Bad(
        "layernorm_quant", {"scale": torch.tensor(1)}, TypeError,
        f"scale has dtype int64; it must be {FLOATS}. Cast it.",
    ),
    "upper bound of two elements": Bad(
        "rmsnorm_dynamic_quant", {"scale_ub": torch.ones(2)}, ValueError,
        "scale_ub has shape [2]; it must hold exactly one element.",
    ),
    "quantised to bf16": Bad(
        "rmsnorm_block_quant", {"quant_dtype": BF16, "group_size": 16}, TypeError,
        "quant_dtype has dtype bfloat16; it must be float8_e4m3fn, float8_e5m2, int8. Cast it.",
    ),
    "output dtype of integers": Bad(
        "l2norm", {"output_dtype": torch.int8}, TypeError,
        f"output_dtype has dtype int8; it must be {FLOATS}. Cast it.",
    ),
    "linear weight of another width": Bad(
        "layernorm_linear", {"linear_weight": torch.ones(5, 47)}, ValueError,
        "linear_weight has shape [5, 47]; it must be [out_features, 48].",
    ),
    "linear weight of one dimension": Bad(
        "layernorm_linear", {"linear_weight": torch.ones(48)}, ValueError,
        "linear_weight has shape [48]; it must be [out_features, 48].",
    ),
    "linear bias of another length": Bad(
        "layernorm_linear", {"linear_bias": torch.ones(6, dtype=BF16)}, ValueError,
        "linear_bias has shape [6]; it must be [5], the number of rows of linear_weight.",
    ),
    "linear weight of another length than its bias": Bad(
        "layernorm_linear", {"linear_weight": torch.ones(6, 48, dtype=BF16)}, ValueError,
        "linear_bias has shape [5]; it must be [6], the number of rows of linear_weight.",
    ),
    "linear bias of another dtype": Bad(
        "layernorm_linear", {"linear_bias": torch.ones(5)}, TypeError,
        "linear_bias has dtype float32; it must be bfloat16. Cast it.",
    ),
}  # fmt: skip


def direct(op: Op, a: samples.Arguments) -> Any:
    return dispatch.call(op, *a.values())


def through_torch(op: Op, a: samples.Arguments) -> Any:
    return getattr(torch.ops.norm_plugin, op.name)(*a.values())


def under_autograd(op: Op, a: samples.Arguments) -> Any:
    """With a weight that requires a gradient, because a written argument cannot."""
    weight = a.get("weight")
    learned = isinstance(weight, Tensor) and weight.is_floating_point()
    return through_torch(op, a | ({"weight": weight.clone().requires_grad_()} if learned else {}))


def good_arguments(op: Op) -> samples.Arguments:
    return samples.arguments(op, SHAPE, BF16, group_size=16 if op.name == "rmsnorm_block_quant" else None)


@pytest.mark.parametrize("after_a_good_call", [False, True], ids=["first", "after_a_good_call"])
@pytest.mark.parametrize("door", [direct, through_torch, under_autograd])
@pytest.mark.parametrize("what", BAD)
def test_bad_input(what: str, door: Callable[[Op, samples.Arguments], Any], after_a_good_call: bool) -> None:
    bad = BAD[what]
    op = OPS[bad.op]
    if after_a_good_call:
        door(op, good_arguments(op))
    a = good_arguments(op) | bad.wrong
    before = {name: value.clone() for name, value in a.items() if isinstance(value, Tensor)}
    with pytest.raises(bad.error) as raised:
        door(op, a)
    assert str(raised.value) == bad.message
    for name, value in before.items():
        assert value.is_meta or torch.equal(value.double(), a[name].double()), name


def test_every_op_refuses_something() -> None:
    assert {bad.op for bad in BAD.values()} == set(OPS)


def test_a_good_call_is_good() -> None:
    """So the calls above fail only because of their wrong argument."""
    for op in OPS.values():
        direct(op, good_arguments(op))


# --- the writing functions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("learned", [False, True], ids=["values", "autograd"])
def test_out_of_another_dtype_or_shape(learned: bool) -> None:
    """Also under autograd, where the result is copied into out."""
    x, weight = inputs.make("normal", SHAPE, BF16), torch.ones(48, requires_grad=learned)
    for out in (torch.zeros(SHAPE), torch.zeros(2, 48, dtype=BF16), one_row(BF16)):
        with pytest.raises((TypeError, ValueError), match=r"^out "):
            norm_plugin.rmsnorm(x, weight, out=out)
        assert (out == 0).all()
