"""The norms with a quantised output against the oracle: the norm, the scale it is quantised by, and the rounding.

The grid: output dtype x dtype of x, of the residual (None included) and of the weight x numerics and Gemma x every
class of input. A scale is judged by itself, and a row by the scale that was written for it. Tolerances: half an ulp of
the quantised dtype (one, for int8) plus norm_plugin.accuracy.bounds over the scale. Nobody defines what a NaN becomes
in int8, so int8 is tested with finite classes only; test_rows shows that such a row spoils no other.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import norm_plugin
from norm_plugin.accuracy import inputs, oracle
from norm_plugin.native.quant import MIN_SCALE, QMAX
from norm_plugin.numerics import LAYER_QUANT_NUMERICS, NUMERICS
from norm_plugin.ops import OPS
from tests.spec import judge, samples
from tests.spec.backend import Backend

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
QUANTISED = list(QMAX)
KINDS = [{"numerics": name} for name in NUMERICS] + [{"gemma": True}]
EPS = 1e-6
SHAPE = (6, 256)


def classes(quantised: torch.dtype) -> dict[str, object]:
    return dict(inputs.CLASSES if quantised.is_floating_point else inputs.FINITE)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("quantised", QUANTISED, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["rmsnorm_quant", "fused_add_rmsnorm_quant"])
def test_static(
    backend: Backend, name: str, dtype: torch.dtype, quantised: torch.dtype, kind: samples.Arguments
) -> None:
    for place, input_class in enumerate(classes(quantised)):
        how = {"weight_dtype": DTYPES[place % 3], "input_class": input_class, "out_dtype": quantised} | kind
        if "residual" in OPS[name].arguments:
            how["residual"] = backend.make("normal", SHAPE, DTYPES[(place + 1) % 3], 9)
        a = backend.arguments(OPS[name], SHAPE, dtype, **how)
        judge.check(OPS[name], a, backend.outputs(OPS[name], a))


@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("quantised", QUANTISED, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["rmsnorm_dynamic_quant", "rmsnorm_block_quant"])
def test_dynamic(
    backend: Backend,
    name: str,
    dtype: torch.dtype,
    quantised: torch.dtype,
    kind: samples.Arguments,
    with_residual: bool,
) -> None:
    for place, input_class in enumerate(classes(quantised)):
        how = {"weight_dtype": DTYPES[place % 3], "input_class": input_class, "quant_dtype": quantised} | kind
        how["residual"] = backend.make("normal", SHAPE, DTYPES[(place + 1) % 3], 9) if with_residual else None
        if name == "rmsnorm_block_quant":
            how["group_size"] = (64, 128, 256)[place % 3]
        a = backend.arguments(OPS[name], SHAPE, dtype, **how)
        judge.check(OPS[name], a, backend.outputs(OPS[name], a))


@pytest.mark.parametrize("given", [{}, {"bias": None}, {"weight": None, "bias": None}], ids=str)
@pytest.mark.parametrize("how", LAYER_QUANT_NUMERICS)
@pytest.mark.parametrize("quantised", QUANTISED, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layernorm_quant(
    backend: Backend, dtype: torch.dtype, quantised: torch.dtype, how: str, given: samples.Arguments
) -> None:
    op = OPS["layernorm_quant"]
    for place, name in enumerate(classes(quantised)):
        made = {"weight_dtype": DTYPES[place % 3], "input_class": name, "out_dtype": quantised, "numerics": how} | given
        a = backend.arguments(op, SHAPE, dtype, **made)
        judge.check(op, a, backend.outputs(op, a))


@pytest.mark.parametrize("width", [256, 65536])
@pytest.mark.parametrize("quantised", QUANTISED, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_layernorm_rounded_before_it_is_quantised(
    backend: Backend, dtype: torch.dtype, quantised: torch.dtype, width: int
) -> None:
    """Half of a row is 2 and half is -2. So with eps 0 its norm is w + b or b - w in any order of summation, and all
    codes are those of the formula. The kernel reads the wider row twice."""
    sign = torch.ones(2, width)
    sign[0, ::2], sign[1, 1::2] = -1.0, -1.0
    weight, bias = backend.weights(width, torch.float32), backend.biases(width, torch.float32)
    sign, scale = sign.to(weight.device), torch.tensor(0.02, device=weight.device)
    norm = sign * weight + bias
    formulas = {"fp32": norm, "flashinfer_layer": norm.to(dtype).float()}
    codes = {}
    for how, y in formulas.items():
        given = {"input": (2 * sign).to(dtype), "weight": weight, "bias": bias, "scale": scale, "eps": 0.0}
        a = backend.arguments(OPS["layernorm_quant"], (2, width), dtype, out_dtype=quantised, numerics=how, **given)
        (out,) = backend.outputs(OPS["layernorm_quant"], a)
        quotient = (y * scale.reciprocal()).clamp(*oracle.RANGES[quantised])
        quotient = quotient if quantised.is_floating_point else quotient.round()
        codes[how] = out.cpu().float()
        assert torch.equal(codes[how], quotient.to(quantised).float().cpu())
    assert torch.equal(codes["fp32"], codes["flashinfer_layer"]) == (dtype == torch.float32)


# --- scales -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantised", QUANTISED, ids=str)
def test_what_does_not_fit_saturates(backend: Backend, quantised: torch.dtype) -> None:
    x = torch.tensor([[3.0, -3.0, 1.0, -1.0]], device=backend.device)
    out = torch.empty_like(x, dtype=quantised)
    norm_plugin.rmsnorm_quant(out, x, None, torch.tensor(1e-6, device=x.device), EPS)
    least, largest = oracle.RANGES[quantised]
    assert out.double().tolist() == [[largest, least, largest, least]]


def test_int8_rounds_halves_to_even(backend: Backend) -> None:
    """Rows of equal magnitude have norm 1 with eps 0, so a scale of 2 gives halves only."""
    weight = torch.tensor([1.0, 3.0, 5.0, -1.0, -3.0, -5.0], device=backend.device)
    x = torch.ones_like(weight).unsqueeze(0)
    out = torch.empty_like(x, dtype=torch.int8)
    norm_plugin.rmsnorm_quant(out, x, weight, torch.tensor(2.0, device=x.device), 0.0)
    assert out.tolist() == [[0, 2, 2, 0, -2, -2]]


def test_a_scale_may_be_a_number(backend: Backend) -> None:
    x = backend.make("normal", SHAPE)
    outs = [torch.empty_like(x, dtype=torch.int8) for _ in range(2)]
    norm_plugin.rmsnorm_quant(outs[0], x, None, 0.02)
    norm_plugin.rmsnorm_quant(outs[1], x, None, torch.tensor(0.02, device=x.device))
    assert torch.equal(*outs)


@pytest.mark.parametrize("quantised", QUANTISED, ids=str)
def test_rows_of_zeros_get_the_least_scale(backend: Backend, quantised: torch.dtype) -> None:
    out, scale = norm_plugin.rmsnorm_dynamic_quant(
        torch.zeros(2, 64, device=backend.device), None, quant_dtype=quantised
    )
    assert (out.double() == 0).all()
    assert scale.tolist() == [[torch.tensor(MIN_SCALE[quantised]).item()]] * 2
    assert MIN_SCALE[quantised] == oracle.LEAST_SCALES[quantised]


def test_the_largest_value_of_a_row_takes_the_largest_of_the_dtype(backend: Backend) -> None:
    for quantised in QUANTISED:
        out, _ = norm_plugin.rmsnorm_dynamic_quant(backend.make("outliers", SHAPE), None, quant_dtype=quantised)
        assert (out.double().abs().amax(-1) == QMAX[quantised]).all()


def test_an_upper_bound_of_the_scale_clips(backend: Backend) -> None:
    x, bound = backend.make("outliers", SHAPE), torch.tensor(0.5, device=backend.device)
    out, scale = norm_plugin.rmsnorm_dynamic_quant(x, None, scale_ub=bound)
    expected = torch.full_like(scale, 0.5) / QMAX[torch.float8_e4m3fn]
    assert torch.equal(scale, expected)
    assert (out.double().abs().amax(-1) == QMAX[torch.float8_e4m3fn]).all()
    a = backend.arguments(OPS["rmsnorm_dynamic_quant"], SHAPE, torch.float32, residual=None, scale_ub=bound)
    judge.check(OPS["rmsnorm_dynamic_quant"], a, backend.outputs(OPS["rmsnorm_dynamic_quant"], a))


def test_scales_lie_beside_their_rows(backend: Backend) -> None:
    x = backend.make("normal", (2, 3, 256), torch.bfloat16)
    assert norm_plugin.rmsnorm_dynamic_quant(x, None)[1].shape == (2, 3, 1)
    assert norm_plugin.rmsnorm_block_quant(x, None, group_size=64)[1].shape == (2, 3, 4)


# --- against what is replaced -------------------------------------------------------------------------------------


def vllm_norm(x: Tensor, residual: Tensor | None, weight: Tensor) -> Tensor:
    """vLLM's RMSNorm in PyTorch, in the dtype of x."""
    h = x.float() if residual is None else x.float() + residual.float()
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype) * weight


@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hf_numerics_have_the_bits_of_norm_then_quantise(dtype: torch.dtype, with_residual: bool) -> None:
    """An engine without fused kernels writes the norm in x's dtype and quantises it in a second step."""
    x, weight = inputs.make("outliers", (64, 256), dtype), inputs.weights(256, dtype)
    residual = inputs.make("normal", (64, 256), dtype, 9) if with_residual else None
    y = vllm_norm(x, residual, weight).float()
    copy = None if residual is None else residual.clone()

    out, scale = norm_plugin.rmsnorm_dynamic_quant(x, weight, copy, EPS, numerics="hf")
    their_scale = y.abs().amax(-1, keepdim=True) / 448.0
    assert torch.equal(scale, their_scale)
    assert torch.equal(out.float(), (y / their_scale).clamp(-448, 448).to(torch.float8_e4m3fn).float())

    copy = None if residual is None else residual.clone()
    out = torch.empty(64, 256, dtype=torch.int8)
    static = torch.tensor(0.05)
    if copy is None:
        norm_plugin.rmsnorm_quant(out, x, weight, static, EPS, numerics="hf")
    else:
        norm_plugin.fused_add_rmsnorm_quant(out, x, copy, weight, static, EPS, numerics="hf")
        assert torch.equal(copy, (x.float() + residual.float()).to(dtype))
    assert torch.equal(out, (y * static.reciprocal()).round().clamp(-128, 127).to(torch.int8))
