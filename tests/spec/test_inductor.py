"""Our norms beside those that Inductor compiles, for every width of a processor's vectors.

Our norms have the bits of the PyTorch functions that they replace, eager and as ops in compiled code, because they call
the same functions. Inductor's own code for these functions has other bits: it sums a row in an order that depends on
the width of its vectors. So fp32 values differ in their last bits, and bf16 values where such a bit carries them over a
tie. Both are right, within half an ulp plus the derived bound of fp32 arithmetic. No more is promised.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch._inductor.config
import torch.nn.functional as F
from torch import Tensor

from norm_plugin.ops import OPS
from tests.spec import judge, samples
from tests.spec.samples import Arguments

#: The bits of a vector in Inductor's code; 0 is none. If a processor lacks such vectors, Inductor uses none.
SIMDLEN = (0, 256, 512)
WIDTH = 100  # some full vectors and a rest, whatever the width of a vector
Norm = Callable[[Arguments], tuple[Tensor, ...]]

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="Inductor needs a C++ compiler"
)


def layer_norm(a: Arguments) -> tuple[Tensor, ...]:
    return (F.layer_norm(a["input"], a["input"].shape[-1:], a["weight"], a["bias"], a["eps"]),)


def normalized(h: Tensor, a: Arguments) -> Tensor:
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + a["eps"])
    return h.to(a["weight"].dtype) * a["weight"]


def rms_norm(a: Arguments) -> tuple[Tensor, ...]:
    """As vLLM's IR has it."""
    return (normalized(a["input"].float(), a),)


def add_rms_norm(a: Arguments) -> tuple[Tensor, ...]:
    """As vLLM's IR has it: the norm of the unrounded sum."""
    h = a["input"].float() + a["residual"].float()
    return normalized(h, a), h.to(a["input"].dtype)


class Case(NamedTuple):
    """One of our ops, the same in plain PyTorch, and the arguments of both."""

    op: str
    theirs: Norm
    a: Arguments

    def label(self) -> str:
        rows = self.a["input"]
        return f"{self.op}-{rows.dtype}"


CASES = [
    Case(op, theirs, samples.arguments(OPS[op], (64, WIDTH), dtype, eps=1e-5, numerics=numerics))
    for op, theirs, numerics in (
        ("layernorm", layer_norm, "torch"),
        ("rmsnorm", rms_norm, "hf"),
        ("add_rmsnorm", add_rms_norm, "hf"),
    )
    for dtype in (torch.bfloat16, torch.float32)
]
LABELS = [case.label() for case in CASES]


def ours(case: Case, **changes: object) -> tuple[Tensor, ...]:
    return samples.outputs(OPS[case.op], case.a | changes, through_torch=True)


class Found(NamedTuple):
    """The results of all cases by label, from one compiled function: of Inductor's own norms, and of our ops."""

    theirs: dict[str, tuple[Tensor, ...]]
    ours: dict[str, tuple[Tensor, ...]]


@functools.cache
def compiled(simdlen: int) -> Found:
    """Compiled by Inductor, without precompiled headers, which only this test would use."""

    def everything(given: list[Arguments]) -> tuple[list[tuple[Tensor, ...]], list[Any]]:
        pairs = list(zip(CASES, given, strict=True))
        ours = [getattr(torch.ops.norm_plugin, case.op)(*a.values()) for case, a in pairs]
        return [case.theirs(a) for case, a in pairs], ours

    how = {"cpp.simdlen": simdlen, "emulate_precision_casts": True, "cpp_cache_precompile_headers": False}
    torch._dynamo.reset()
    with torch._inductor.config.patch(how):
        theirs, ours = torch.compile(everything, fullgraph=True)([case.a for case in CASES])
    ours = [(one,) if isinstance(one, Tensor) else one for one in ours]
    return Found(*(dict(zip(LABELS, side, strict=True)) for side in (theirs, ours)))


@pytest.mark.parametrize("case", CASES, ids=LABELS)
def test_eager_bits_are_those_of_the_functions(case: Case) -> None:
    assert all(map(torch.equal, ours(case), case.theirs(case.a)))


@pytest.mark.parametrize("simdlen", SIMDLEN)
@pytest.mark.parametrize("case", CASES, ids=LABELS)
def test_an_op_in_compiled_code_has_its_eager_bits(case: Case, simdlen: int) -> None:
    assert all(map(torch.equal, compiled(simdlen).ours[case.label()], ours(case)))


@pytest.mark.parametrize("simdlen", SIMDLEN)
@pytest.mark.parametrize("case", CASES, ids=LABELS)
def test_inductors_own_norm_and_ours_are_within_one_bound(case: Case, simdlen: int) -> None:
    op = OPS[case.op]
    judge.check(op, case.a, compiled(simdlen).theirs[case.label()])
    judge.check(op, case.a, compiled(simdlen).ours[case.label()])


@pytest.mark.parametrize("simdlen", SIMDLEN)
def test_inductors_own_layernorm_has_other_bits(simdlen: int) -> None:
    """If they had the same, the engines' tests of compiled code could compare with the unchanged engine."""
    found = compiled(simdlen)
    label = "layernorm-torch.float32"
    assert not torch.equal(found.theirs[label][0], found.ours[label][0])


@pytest.mark.parametrize("wrong", ["scale", "eps"])
@pytest.mark.parametrize("case", CASES, ids=LABELS)
def test_a_wrong_norm_is_beyond_the_bound(case: Case, wrong: str) -> None:
    a = case.a
    changes = {"weight": a["weight"] * 1.01} if wrong == "scale" else {"eps": 10 * a["eps"]}
    with pytest.raises(AssertionError, match="ulps beyond its bound"):
        judge.check(OPS[case.op], a, ours(case, **changes))
