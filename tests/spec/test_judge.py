"""The judge itself: ulps are right, oracles agree with torch in fp64, and the judge finds mistakes."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from norm_plugin.accuracy import bounds, inputs, oracle, ulps
from norm_plugin.numerics import NUMERICS
from norm_plugin.ops import OPS
from tests.spec import judge, samples

EPS = 1e-6
NAN, INF = float("nan"), float("inf")


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# --- ulps ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [t for t in ulps.FORMATS if t != torch.float64], ids=str)
def test_neighbours_are_one_ulp_apart(dtype: torch.dtype) -> None:
    """Each value of the dtype and the next one, in all binades and the subnormals."""
    digits, least, largest = ulps.FORMATS[dtype]
    mantissas = 1 + torch.arange(0, 2**digits, max(1, 2**digits // 16), dtype=torch.float64) / 2**digits
    exponents = torch.arange(least, largest, max(1, (largest - least) // 40), dtype=torch.float64)
    values = (mantissas[:, None] * exponents.exp2()).flatten()
    spacing = ulps.size(values, dtype)
    assert torch.equal(values.to(dtype).double(), values)
    assert torch.equal((values + spacing).to(dtype).double(), values + spacing)
    assert not torch.equal((values + spacing / 2).to(dtype).double(), values + spacing / 2)
    assert torch.equal(ulps.distance((values + spacing).to(dtype), values), torch.ones_like(values))
    subnormal = doubles(0.0, 2.0 ** (least - digits))
    assert ulps.distance(subnormal.to(dtype), subnormal.flip(0)).tolist() == [1.0, 1.0]


def test_rounding_is_half_an_ulp() -> None:
    """And 2^-14 more, because torch casts fp64 to fp16 by way of fp32."""
    values = inputs.row_scales((64, 64), 0).double() * math.pi
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert 0.45 < ulps.measure(values.to(dtype), values).max <= 0.5 + 2.0**-14


def test_integers_are_one_apart() -> None:
    assert ulps.distance(torch.tensor([3, -128], dtype=torch.int8), doubles(3.25, -126)).tolist() == [0.25, 2.0]


def test_nan_and_inf_count_where_they_are() -> None:
    of = torch.tensor([NAN, NAN, 1.0, INF, INF, -INF, 65504.0], dtype=torch.float16)
    truth = doubles(NAN, 1.0, NAN, INF, -INF, -70000.0, 65520.0)
    found = ulps.distance(of, truth).tolist()
    assert found[:4] == [0, INF, INF, 0]
    assert found[4] > 1000
    assert found[5:] == [0, 0.5]
    assert math.isinf(ulps.measure(of, truth).max)


def test_the_nearest_oracle_counts_and_the_worst_element() -> None:
    of = torch.tensor([1.0, 2.0])
    one, other = doubles(1.0, 2 + 2.0**-20), doubles(5.0, 2 + 2.0**-21)
    assert ulps.measure(of, one, other) == (2.0, 1.0)
    assert ulps.excess(of, torch.zeros(2).double(), one, other) == 1.5
    assert ulps.excess(of, torch.full((2,), 2.0**-21).double(), one, other) == 0


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"actual has shape \[2\] and the oracle \[1\]"):
        ulps.distance(torch.ones(2), doubles(1.0))


# --- oracles, against torch in fp64: off by the roundings of both --------------------------------------------------


def test_oracles_agree_with_torch() -> None:
    x, z = (inputs.make("outliers", (16, 96), torch.float64, seed) for seed in (1, 2))
    weight, bias = inputs.weights(96, torch.float64), inputs.biases(96, torch.float64)
    matrix = inputs.make("normal", (5, 96), torch.float64, 3)
    rms, layer = F.rms_norm(x, (96,), weight, EPS), F.layer_norm(x, (96,), weight, bias, EPS)
    groups = F.layer_norm((x * F.silu(z)).unflatten(-1, (6, 16)), (16,), None, None, EPS).flatten(-2) * weight + bias
    pairs = [
        (oracle.rmsnorm(x, weight, EPS), rms),
        (oracle.rmsnorm(x, weight - 1, EPS, gemma=True), rms),
        (oracle.add_rmsnorm(x - z, z, weight, EPS)[0], F.rms_norm((x - z) + z, (96,), weight, EPS)),
        (oracle.l2norm(x, 0.0), F.normalize(x, dim=-1)),
        (oracle.layernorm(x, weight, bias, EPS), layer),
        (oracle.layernorm_linear(x, weight, bias, matrix, None, EPS), F.linear(layer, matrix)),
        (oracle.gated_norm(x, weight, None, z, EPS, is_rms_norm=True), rms * F.silu(z)),
        (oracle.gated_norm(x, weight, bias, z, EPS, activation="sigmoid"), layer * torch.sigmoid(z)),
        (oracle.gated_norm(x, weight, bias, z, EPS, 16, norm_before_gate=False), groups),
    ]
    for place, (ours, theirs) in enumerate(pairs):
        torch.testing.assert_close(ours, theirs, rtol=2.0**-44, atol=2.0**-44, msg=str(place))


# --- mistakes that the judge must find -----------------------------------------------------------------------------


def norm(x: Tensor, weight: Tensor, eps: float, divide_by: int = 0, outside: bool = False) -> Tensor:
    h = x.float()
    mean = h.square().sum(-1, keepdim=True) / (divide_by or h.shape[-1])
    s = 1 / (mean.sqrt() + eps) if outside else torch.rsqrt(mean + eps)
    return h * s * weight.float()


MISTAKES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "a mean over N - 1": lambda x, w, eps: norm(x, w, eps, divide_by=x.shape[-1] - 1).to(x.dtype),
    "eps outside the root": lambda x, w, eps: norm(x, w, eps, outside=True).to(x.dtype),
    "eps left out": lambda x, w, eps: norm(x, w, 0.0).to(x.dtype),
    "rounded before the weight": lambda x, w, eps: norm(x, torch.ones_like(w), eps).to(x.dtype) * w,
    "truncated": lambda x, w, eps: (norm(x, w, eps).view(torch.int32) & -65536).view(torch.float32).to(x.dtype),
    "one column wrong": lambda x, w, eps: norm(x, w.clone().index_fill_(0, torch.tensor([7]), 1.0), eps).to(x.dtype),
    "a row of its neighbour": lambda x, w, eps: norm(x, w, eps).roll(1, 0).to(x.dtype),
    "computed in bf16": lambda x, w, eps: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * w,
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found(mistake: str) -> None:
    a = samples.arguments(OPS["rmsnorm"], (16, 768), torch.bfloat16, eps=1e-2)
    right = norm(a["input"], a["weight"], a["eps"]).to(torch.bfloat16)
    judge.check(OPS["rmsnorm"], a, (right,))
    with pytest.raises(AssertionError, match="beyond its bound"):
        judge.check(OPS["rmsnorm"], a, (MISTAKES[mistake](a["input"], a["weight"], a["eps"]),))


def of_rounded_sum(numerics: str) -> bool:
    return numerics in NUMERICS and NUMERICS[numerics].output_of_rounded_sum


@pytest.mark.parametrize("name", [name for name, variants in samples.VARIANTS.items() if len(variants) > 1])
def test_every_variant_tells(name: str) -> None:
    """The result of the plain call is wrong for a variant. So the tests would notice if an op ignored a flag.

    Left out are output dtypes, which judge.check compares itself; absent arguments, which are no flags; and, for ops
    without a residual, numerics that differ only in the sum with a residual.
    """
    op = OPS[name]
    plain = samples.arguments(op, (16, 96), torch.bfloat16)
    for variant in samples.VARIANTS[name]:
        dtypes = set(variant) <= {"quant_dtype", "out_dtype", "output_dtype"}
        of_a_sum = of_rounded_sum(variant.get("numerics", "fp32")) and "residual" not in op.arguments
        if dtypes or of_a_sum or None in variant.values():
            continue
        a = samples.arguments(op, (16, 96), torch.bfloat16, **variant)
        with pytest.raises((AssertionError, RuntimeError)):
            judge.check(op, a, samples.outputs(op, plain))


def test_a_bound_is_small() -> None:
    """For a product: 2^-12 of an ulp of bf16, beside half an ulp, and 16 ulps of fp32."""
    x, weight = inputs.make("normal", (16, 768)), inputs.weights(768)
    bound, truth = bounds.rmsnorm(x, weight), oracle.rmsnorm(x, weight)
    assert (bound / ulps.size(truth, torch.bfloat16)).max() <= 2.0**-12
    assert (bound / ulps.size(truth, torch.float32)).max() <= 16


def test_no_worse_can_tell() -> None:
    x, weight = inputs.make("normal", (256, 64)), inputs.weights(64)
    truth = oracle.rmsnorm(x, weight)
    ours = norm(x, weight, EPS)
    judge.no_worse(ours, ours, truth)
    with pytest.raises(AssertionError, match="by chance"):
        judge.no_worse(ours * (1 + 2.0**-23), ours, truth)
