"""Any call is right: hypothesis chooses the op, its arguments, shapes, dtypes, strides and values.

The examples are the same in every run (derandomized), and hypothesis shrinks one that fails. Tolerances are those of
judge.check, derived from the formula of the op.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from norm_plugin.accuracy import inputs
from norm_plugin.native.quant import QMAX
from norm_plugin.numerics import ACTIVATIONS, FP32, HF, LAYER_QUANT_NUMERICS, NUMERICS
from norm_plugin.ops import OPS
from tests.spec import judge, samples
from tests.spec.layouts import LAYOUTS

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
EPSILONS = [1e-6, 1e-5, 1e-12, 1.0]

#: Without PyTorch's own functions, whose last bits depend on the place of a value, and whose errors are not ours.
NUMERICS_OF = {"gated": [FP32.name, HF.name], "split": [FP32.name, HF.name], "layer": [FP32.name]}
NUMERICS_OF_OP = {"layernorm_quant": list(LAYER_QUANT_NUMERICS)}

fixed = settings(
    derandomize=True,
    max_examples=200,
    deadline=None,  # a busy machine is no failure
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.differing_executors],
)

#: Widths that fill no vector, fill one, and leave a rest. Group sizes divide them.
widths = st.one_of(st.integers(1, 70), st.sampled_from([96, 128, 255, 256, 1000]))
leading = st.lists(st.integers(0, 5), max_size=3)


@st.composite
def calls(draw: st.DrawFn, name: str) -> samples.Arguments:
    """The arguments of a call that must work."""
    op = OPS[name]
    width = draw(widths)
    shape = (*draw(leading), width)
    dtype, weight_dtype = draw(st.sampled_from(FLOATS)), draw(st.sampled_from(FLOATS))
    out_dtype = draw(st.sampled_from(list(QMAX)))
    quantised = "scale" in op.arguments or "quant_dtype" in op.arguments
    divisors = [n for n in range(1, width + 1) if width % n == 0]
    choices: dict[str, st.SearchStrategy[Any]] = {
        "eps": st.sampled_from(EPSILONS),
        "numerics": st.sampled_from(NUMERICS_OF_OP.get(name) or NUMERICS_OF.get(op.kind) or list(NUMERICS)),
        "gemma": st.booleans(),
        "variance_size": st.one_of(st.none(), st.integers(1, width)),
        "output_dtype": st.sampled_from([None, *FLOATS]),
        "group_size": st.sampled_from(divisors if quantised else [None, *divisors]),
        "norm_before_gate": st.booleans(),
        "is_rms_norm": st.booleans(),
        "activation": st.sampled_from(ACTIVATIONS),
        "quant_dtype": st.just(out_dtype),
        "scale": st.floats(0.001, 10).map(torch.tensor),
        "scale_ub": st.one_of(st.none(), st.floats(0.1, 10).map(torch.tensor)),
    }
    chosen = {key: draw(choices[key]) for key in op.arguments if key in choices}
    absent = draw(st.sets(st.sampled_from(["weight", "bias", "z", "linear_bias", "residual"])))
    required = {"weight"} if chosen.get("gemma") else set()
    if name in ("add_rmsnorm", "fused_add_rmsnorm", "fused_add_rmsnorm_quant"):
        required.add("residual")
    chosen |= {key: None for key in absent - required if key in op.arguments}
    finite = quantised and out_dtype == torch.int8
    input_class = draw(st.sampled_from(list(inputs.FINITE if finite or name == "layernorm_linear" else inputs.CLASSES)))
    if math.prod(shape[:-1]) == 0:
        input_class = "normal"
    a = samples.arguments(
        op, shape, dtype, weight_dtype=weight_dtype, input_class=input_class, out_dtype=out_dtype, **chosen
    )
    if a.get("residual") is not None:
        a["residual"] = a["residual"].to(draw(st.sampled_from(FLOATS)))
    return a | {key: draw(layouts)(a[key]) for key in samples.alike(op) if a[key] is not None}


layouts = st.sampled_from(list(LAYOUTS.values()))


@given(st.data())
@settings(fixed, max_examples=120 * len(OPS))
def test_any_call_is_right(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(list(OPS)))
    op, a = OPS[name], data.draw(calls(name))
    judge.check(op, a, samples.outputs(op, a, through_torch=data.draw(st.booleans())))


@given(st.data())
@fixed
def test_rows_are_independent_in_any_call(data: st.DataObject) -> None:
    """A row has the same bits alone and in its batch. (Not in layernorm_linear: the matrix product is PyTorch's.)"""
    name = data.draw(st.sampled_from([name for name in OPS if name != "layernorm_linear"]))
    op, a = OPS[name], data.draw(calls(name))
    shape = a[op.arguments[op.x]].shape
    if len(shape) < 2 or shape[0] == 0:
        return
    row = data.draw(st.integers(0, shape[0] - 1))
    one = a | {key: a[key][row : row + 1] for key in samples.alike(op) if a[key] is not None}
    for alone, whole in zip(samples.outputs(op, one), samples.outputs(op, a), strict=True):
        part = whole[row : row + 1].double()
        assert torch.equal(alone.double().isnan(), part.isnan())
        assert torch.equal(alone.double().nan_to_num(), part.nan_to_num())


@given(st.data())
@fixed
def test_fakes_describe_any_call(data: st.DataObject) -> None:
    """Shape, dtype and strides of the outputs. Strides only if there are elements: without any, torch.empty_like gives
    fake tensors other strides."""
    name = data.draw(st.sampled_from(list(OPS)))
    op, a = OPS[name], data.draw(calls(name))
    real = samples.outputs(op, a)[: -len(samples.written(op, a)) or None]
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(value) if isinstance(value, torch.Tensor) else value for value in a.values()]
        fake = getattr(torch.ops.norm_plugin, name)(*fakes)
    fake = (fake,) if isinstance(fake, torch.Tensor) else fake or ()
    for one, other in zip(real, fake, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        steps = [pair for size, *pair in zip(one.shape, one.stride(), other.stride(), strict=True) if size > 1]
        assert one.numel() == 0 or all(mine == theirs for mine, theirs in steps)
