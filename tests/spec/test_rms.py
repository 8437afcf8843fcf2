"""RMSNorm, the fused add, Gemma's variant and the l2 norm, against the oracle and against the norms that they replace.

The grid: every dtype of x, residual and weight (None included) x every numerics and Gemma x every class of input.
Tolerances: half an ulp of the output plus norm_plugin.accuracy.bounds, which derives them from the formula.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import norm_plugin
from norm_plugin.accuracy import inputs, oracle
from norm_plugin.accuracy.compared import CHANCE
from norm_plugin.numerics import NUMERICS
from norm_plugin.ops import OPS
from tests.spec import judge, samples
from tests.spec.backend import Backend

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
WEIGHT_DTYPES = [None, *DTYPES]
KINDS = [{"numerics": name} for name in NUMERICS] + [{"gemma": True}, {"variance_size": 33}]
WIDTHS = (100, 768)
EPS = 1e-6

#: Classes whose rows are independent and whose values all differ, so that errors average out.
INDEPENDENT = ("normal", "outliers", "row_scales", "large_mean")
ROWS = 256


def of_weight(dtype: torch.dtype | None, kind: samples.Arguments) -> samples.Arguments:
    """The arguments for a weight of this dtype. Gemma's norm always has one."""
    if dtype is None:
        return {} if "gemma" in kind else {"weight": None}
    return {"weight_dtype": dtype}


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("weight_dtype", WEIGHT_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rmsnorm(
    backend: Backend, dtype: torch.dtype, weight_dtype: torch.dtype | None, kind: samples.Arguments
) -> None:
    op = OPS["rmsnorm"]
    for name in inputs.CLASSES:
        for width in WIDTHS:
            how = of_weight(weight_dtype, kind) | kind
            a = backend.arguments(op, (6, width), dtype, input_class=name, **how)
            judge.check(op, a, backend.outputs(op, a))


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("weight_dtype", WEIGHT_DTYPES, ids=str)
@pytest.mark.parametrize("residual_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_rmsnorm(
    backend: Backend,
    dtype: torch.dtype,
    residual_dtype: torch.dtype,
    weight_dtype: torch.dtype | None,
    kind: samples.Arguments,
) -> None:
    op = OPS["add_rmsnorm"]
    for place, name in enumerate(inputs.CLASSES):
        shape = (6, WIDTHS[place % 2])
        residual = backend.make("normal", shape, residual_dtype, seed=9)
        how = of_weight(weight_dtype, kind) | kind
        a = backend.arguments(op, shape, dtype, input_class=name, residual=residual, **how)
        judge.check(op, a, backend.outputs(op, a))


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_ops_that_write_give_the_bits_of_the_functional_ones(
    backend: Backend, dtype: torch.dtype, kind: samples.Arguments
) -> None:
    for functional, writing in (("rmsnorm", "rmsnorm_out"), ("add_rmsnorm", "fused_add_rmsnorm")):
        results = [
            backend.outputs(OPS[name], backend.arguments(OPS[name], (6, 768), dtype, **kind))
            for name in (functional, writing)
        ]
        assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("residual_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_residual_is_the_fp32_sum_rounded_once(
    backend: Backend, dtype: torch.dtype, residual_dtype: torch.dtype
) -> None:
    x, residual = backend.make("normal", (64, 768), dtype, 1), backend.make("row_scales", (64, 768), residual_dtype, 2)
    written = (x.float() + residual.float()).to(residual_dtype)
    for numerics in NUMERICS:
        assert torch.equal(norm_plugin.add_rmsnorm(x, residual, None, EPS, numerics=numerics)[1], written)


@pytest.mark.parametrize("output_dtype", [None, *DTYPES], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_l2norm(backend: Backend, dtype: torch.dtype, output_dtype: torch.dtype | None) -> None:
    op = OPS["l2norm"]
    for name in inputs.CLASSES:
        for width in WIDTHS:
            a = backend.arguments(op, (6, width), dtype, input_class=name, output_dtype=output_dtype)
            judge.check(op, a, backend.outputs(op, a))


# --- bits that are promised ---------------------------------------------------------------------------------------


class LlamaRMSNorm(nn.Module):
    """Hugging Face's, line by line."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)


@pytest.mark.parametrize("name", inputs.CLASSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hf_numerics_have_the_bits_of_hugging_face(dtype: torch.dtype, name: str) -> None:
    x, weight = inputs.make(name, (64, 768), dtype), inputs.weights(768, dtype)
    ours = norm_plugin.rmsnorm(x, weight, EPS, numerics="hf")
    with torch.no_grad():
        theirs = LlamaRMSNorm(weight, EPS)(x)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    scaled = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS)
    torch.testing.assert_close(ours, scaled.to(dtype) * weight, rtol=0, atol=0, equal_nan=True)


def test_numerics_differ(backend: Backend) -> None:
    """If two of them agreed, the tests above would not notice a kernel that confuses them."""
    a = backend.arguments(OPS["add_rmsnorm"], (64, 768), torch.bfloat16)
    outs = {
        name: norm_plugin.add_rmsnorm(a["input"], a["residual"], a["weight"], EPS, numerics=name) for name in NUMERICS
    }
    names = list(NUMERICS)
    for place, name in enumerate(names):
        for other in names[place + 1 :]:
            assert not torch.equal(outs[name][0], outs[other][0]), (name, other)


def test_gemma_adds_one_in_fp32(backend: Backend) -> None:
    """1 + 2^-9 is 1 in bf16, so this weight would have no effect if it were added in bf16."""
    x = backend.make("normal", (8, 64), torch.bfloat16)
    small = torch.full_like(backend.weights(64, torch.bfloat16), 2.0**-9)
    ours = norm_plugin.gemma_rmsnorm(x, small, EPS)
    assert torch.equal(ours, norm_plugin.rmsnorm(x, 1 + small.float(), EPS))
    assert not torch.equal(ours, norm_plugin.rmsnorm(x, 1 + small, EPS))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_zeros_without_eps_are_nan_as_in_torch(backend: Backend, dtype: torch.dtype) -> None:
    x = backend.make("zeros", (6, 96), dtype)
    theirs = F.rms_norm(x, (96,), None, 0.0).isnan()
    assert theirs.any()
    assert not theirs.all()
    for numerics in NUMERICS:
        assert torch.equal(norm_plugin.rmsnorm(x, None, 0.0, numerics=numerics).isnan(), theirs)
        assert torch.equal(norm_plugin.add_rmsnorm(x, x, None, 0.0, numerics=numerics)[0].isnan(), theirs)
    assert torch.equal(norm_plugin.l2norm(x, 0.0).isnan(), theirs)
    a = backend.arguments(OPS["rmsnorm"], x.shape, dtype, input=x, eps=0.0)
    judge.check(OPS["rmsnorm"], a, backend.outputs(OPS["rmsnorm"], a))


# --- against what is replaced -------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [64, 768, 1000, 4096])
@pytest.mark.parametrize("name", INDEPENDENT)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_worse_than_torch(dtype: torch.dtype, name: str, width: int) -> None:
    x, weight = inputs.make(name, (ROWS, width), dtype), inputs.weights(width, dtype)
    ours, theirs = norm_plugin.rmsnorm(x, weight, EPS), F.rms_norm(x, (width,), weight, EPS)
    judge.no_worse(ours, theirs, oracle.rmsnorm(x, weight, EPS))


@pytest.mark.parametrize("numerics", ["fp32", "hf", "vllm_c", "sgl_jit"])
@pytest.mark.parametrize("name", INDEPENDENT)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fused_add_no_worse_than_the_formula_of_its_engine(dtype: torch.dtype, name: str, numerics: str) -> None:
    """Against the formula of each engine in PyTorch, by the plain fp64 norm of x + residual."""
    x, r = inputs.make(name, (ROWS, 256), dtype, 1), inputs.make("normal", (ROWS, 256), dtype, 2)
    w = inputs.weights(256, dtype)
    h = x.float() + r.float()
    rounded = h.to(dtype).float()
    s, s_of_rounded = (torch.rsqrt(v.pow(2).mean(-1, keepdim=True) + EPS) for v in (h, rounded))
    theirs = {
        "fp32": h * s * w.float(),
        "hf": (h * s).to(dtype) * w,
        "vllm_c": rounded * s_of_rounded * w.float(),
        "sgl_jit": rounded * w.float() * s,
    }[numerics].to(dtype)
    ours, _ = norm_plugin.add_rmsnorm(x, r, w, EPS, numerics=numerics)
    judge.no_worse(ours, theirs, oracle.add_rmsnorm(x, r, w, EPS)[0])


@pytest.mark.parametrize("name", INDEPENDENT)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_l2norm_no_worse_than_the_formula(dtype: torch.dtype, name: str) -> None:
    x = inputs.make(name, (ROWS, 128), dtype)
    theirs = x.float() * torch.rsqrt((x.float() * x.float()).sum(-1, keepdim=True) + EPS)
    judge.no_worse(norm_plugin.l2norm(x, EPS), theirs.to(dtype), oracle.l2norm(x, EPS))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_one_rounding_costs_a_quarter_of_an_ulp_on_average(dtype: torch.dtype) -> None:
    """Correctly rounded errors are uniform in [0, 1/2] ulp, so their mean is 1/4, with a standard error of
    1 / sqrt(48 n). fp32 adds less than 2^-12. A second rounding would show."""
    x, weight = inputs.make("normal", (ROWS, 768), dtype), inputs.weights(768, torch.float32)
    apart = judge.ulps.measure(norm_plugin.rmsnorm(x, weight, EPS), oracle.rmsnorm(x, weight, EPS))
    assert abs(apart.mean - 0.25) <= CHANCE / (48 * x.numel()) ** 0.5 + 2.0**-12
