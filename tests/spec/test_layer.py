"""LayerNorm and LayerNorm + linear against the oracle, and against torch's own.

The grid: every dtype of x and of weight and bias x weight and bias given or not x every class of input. Tolerances:
half an ulp of the output plus norm_plugin.accuracy.bounds, which derives them from the formula.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import norm_plugin
from norm_plugin.accuracy import bounds, inputs, oracle, ulps
from norm_plugin.native import simple_layernorm_native
from norm_plugin.ops import OPS
from tests.spec import judge, layouts, samples
from tests.spec.backend import Backend

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
WIDTHS = (100, 768)
EPS = 1e-6
ROWS = 256
GIVEN = [{}, {"weight": None}, {"bias": None}, {"weight": None, "bias": None}]

#: Classes whose rows are independent and whose values all differ, so that errors average out.
INDEPENDENT = ("normal", "outliers", "row_scales", "large_mean")


@pytest.mark.parametrize("given", GIVEN, ids=str)
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layernorm(backend: Backend, dtype: torch.dtype, weight_dtype: torch.dtype, given: samples.Arguments) -> None:
    op = OPS["layernorm"]
    for name in inputs.CLASSES:
        for width in WIDTHS:
            a = backend.arguments(op, (6, width), dtype, weight_dtype=weight_dtype, input_class=name, **given)
            judge.check(op, a, backend.outputs(op, a))


@pytest.mark.parametrize("given", [*GIVEN, {"linear_bias": None}], ids=str)
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layernorm_linear(
    backend: Backend, dtype: torch.dtype, weight_dtype: torch.dtype, given: samples.Arguments
) -> None:
    op = OPS["layernorm_linear"]
    for name in inputs.FINITE:
        a = backend.arguments(op, (6, 768), dtype, weight_dtype=weight_dtype, input_class=name, **given)
        judge.check(op, a, backend.outputs(op, a))


def test_weight_and_bias_may_have_different_dtypes(backend: Backend) -> None:
    a = backend.arguments(OPS["layernorm"], (6, 96), torch.bfloat16, weight_dtype=torch.float32)
    a["bias"] = a["bias"].half()
    judge.check(OPS["layernorm"], a, backend.outputs(OPS["layernorm"], a))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_linear_layer_rounds_once_whatever_the_strides(backend: Backend, dtype: torch.dtype) -> None:
    """F.linear adds the bias to a rounded product where x is a transposed 3-D tensor; the op hands it rows."""
    op = OPS["layernorm_linear"]
    a = backend.arguments(op, (4, 3, 48), dtype)
    (expected,) = backend.outputs(op, a)
    (found,) = backend.outputs(op, a | {"x": layouts.transposed(a["x"])})
    assert torch.equal(found, expected)


def test_simple_layernorm_native_is_layernorm() -> None:
    a = samples.arguments(OPS["layernorm"], (6, 96))
    a.pop("numerics")
    assert torch.equal(simple_layernorm_native(*a.values()), norm_plugin.layernorm(*a.values()))


# --- against torch ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [64, 768, 1000, 4096])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("name", INDEPENDENT)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_worse_than_torch(dtype: torch.dtype, name: str, affine: bool, width: int) -> None:
    x = inputs.make(name, (ROWS, width), dtype)
    weight, bias = (inputs.weights(width, dtype), inputs.biases(width, dtype)) if affine else (None, None)
    ours, theirs = norm_plugin.layernorm(x, weight, bias, EPS), F.layer_norm(x, (width,), weight, bias, EPS)
    judge.no_worse(ours, theirs, oracle.layernorm(x, weight, bias, EPS))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layernorm_linear_no_worse_than_torch(dtype: torch.dtype) -> None:
    """Against the fp64 product of the unrounded fp64 norm. Both round the norm to the dtype of x."""
    a = samples.arguments(
        OPS["layernorm_linear"],
        (ROWS, 768),
        dtype,
        linear_weight=inputs.make("normal", (64, 768), dtype, 4),
        linear_bias=inputs.biases(64, dtype),
    )
    normed = F.layer_norm(a["x"], (768,), a["weight"], a["bias"], EPS)
    theirs = F.linear(normed, a["linear_weight"], a["linear_bias"])
    truth = oracle.layernorm(*list(a.values())[:3], EPS) @ a["linear_weight"].double().t() + a["linear_bias"].double()
    judge.no_worse(norm_plugin.layernorm_linear(*a.values()), theirs, truth)


@pytest.mark.parametrize("width", [1, 7, 64, 768, 4096])
def test_within_a_millionth_of_torch_in_fp32(width: int) -> None:
    """1e-6, absolute or relative, whichever is larger: above 16 an ulp alone is more than 1e-6."""
    x = inputs.make("normal", (ROWS, width))
    for weight, bias in ((None, None), (inputs.weights(width), inputs.biases(width))):
        ours, theirs = norm_plugin.layernorm(x, weight, bias, EPS), F.layer_norm(x, (width,), weight, bias, EPS)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_variance_give_the_bias(dtype: torch.dtype) -> None:
    """The mean of equal values is not exact in fp32. 1 / sqrt(eps) must not enlarge the rest."""
    x, bias = inputs.make("constant_rows", (ROWS, 1000), dtype), inputs.biases(1000, dtype)
    ours = norm_plugin.layernorm(x, inputs.weights(1000, dtype), bias, EPS)
    expected = bias.double().expand_as(x)
    assert ulps.excess(ours, bounds.layernorm(x, None, bias, EPS), expected) == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_zeros_without_eps_are_nan_as_in_torch(backend: Backend, dtype: torch.dtype) -> None:
    x = backend.make("zeros", (6, 96), dtype)
    theirs = F.layer_norm(x, (96,), None, None, 0.0).isnan()
    assert theirs.any()
    assert not theirs.all()
    assert torch.equal(norm_plugin.layernorm(x, None, None, 0.0).isnan(), theirs)
