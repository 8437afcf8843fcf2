"""Rows whose parts lie on several ranks: both ops against the oracle, the parts against the whole, and against the
formula that they replace.

The grid: dtype of x and z and of weight x weight and z given or not x numerics x every class of input. Tolerances: half
an ulp of the output plus norm_plugin.accuracy.bounds, which derives them from the formula.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from norm_plugin import dispatch
from norm_plugin.accuracy import bounds, inputs, oracle, ulps
from norm_plugin.numerics import GATED_NUMERICS, TORCH_HF
from norm_plugin.ops import OPS
from norm_plugin.split import rmsnorm_of_part
from tests.spec import judge, samples
from tests.spec.backend import Backend

SUMS, NORM = OPS["split_sums"], OPS["split_rmsnorm"]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
EPS = 1e-5


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("numerics", GATED_NUMERICS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums(backend: Backend, dtype: torch.dtype, numerics: str, gated: bool) -> None:
    for name in inputs.CLASSES:
        a = backend.arguments(SUMS, (6, 192), dtype, input_class=name, numerics=numerics)
        a |= {} if gated else {"z": None}
        judge.check(SUMS, a, backend.outputs(SUMS, a))


@pytest.mark.parametrize("given", [{}, {"z": None}, {"weight": None}], ids=str)
@pytest.mark.parametrize("numerics", GATED_NUMERICS)
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm(
    backend: Backend, dtype: torch.dtype, weight_dtype: torch.dtype, numerics: str, given: samples.Arguments
) -> None:
    for name in inputs.CLASSES:
        a = backend.arguments(
            NORM, (6, 192), dtype, weight_dtype=weight_dtype, input_class=name, numerics=numerics, **given
        )
        judge.check(NORM, a, backend.outputs(NORM, a))


def test_z_may_have_its_own_dtype(backend: Backend) -> None:
    for op, dtype, z_dtype in product((SUMS, NORM), DTYPES, DTYPES):
        a = backend.arguments(op, (6, 64), dtype, z=backend.make("normal", (6, 64), z_dtype, 3))
        judge.check(op, a, backend.outputs(op, a))


def in_parts(x: Tensor, weight: Tensor, z: Tensor, parts: int, numerics: str) -> Tensor:
    """The norm of whole rows, as `parts` ranks compute it, one after another: each part's sums, then its norm."""
    shares = list(zip(x.chunk(parts, -1), weight.chunk(parts), z.chunk(parts, -1), strict=True))
    seen: list[Tensor] = []

    def note(sums: Tensor) -> Tensor:
        seen.append(sums)
        return sums

    def total(sums: Tensor) -> Tensor:
        assert any(torch.equal(sums, one) for one in seen)
        return torch.stack(seen).sum(0)

    for share in shares:
        rmsnorm_of_part(*share, EPS, parts, note, numerics=numerics)
    return torch.cat([rmsnorm_of_part(*share, EPS, parts, total, numerics=numerics) for share in shares], -1)


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
@pytest.mark.parametrize("numerics", GATED_NUMERICS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_parts_make_the_whole(backend: Backend, dtype: torch.dtype, numerics: str, parts: int) -> None:
    """Right as a norm of whole rows. Each added part costs a rounding, which the root halves."""
    x, z, weight = (backend.make("normal", (5, 192), dtype, 1), backend.make("normal", (5, 192), dtype, 2),
                    backend.weights(192, dtype))  # fmt: skip
    before = [dispatch.calls(op.name) for op in (SUMS, NORM)]
    found = in_parts(x, weight, z, parts, numerics)
    assert [dispatch.calls(op.name) for op in (SUMS, NORM)] == [n + 2 * parts for n in before]
    how = (x, weight, None, z, EPS, None, False, True, "silu", numerics)
    truths = [oracle.gated_norm(*how, nudge=nudge) for nudge in oracle.NUDGES]
    added = parts / 2 * bounds.rounding(dtype) * truths[0].abs()
    assert ulps.excess(found, bounds.gated_norm(*how) + added, *truths) == 0


def test_the_sums_of_other_ranks_count(backend: Backend) -> None:
    """One rank alone would answer something else."""
    x, z, weight = backend.make("normal", (5, 64)), backend.make("normal", (5, 64), seed=2), backend.weights(64)
    alone = rmsnorm_of_part(x[:, :32], weight[:32], z[:, :32], EPS, 1, lambda sums: sums)
    together = in_parts(x, weight, z, 2, "fp32")[:, :32]
    assert ((alone - together).abs() > 1e-3).float().mean() > 0.9


def mixer2(x: Tensor, gate: Tensor, weight: Tensor, others: Tensor, ranks: int) -> Tensor:
    """What vLLM and SGLang compute for one group on several ranks. `others` are the sums of all other ranks."""
    h = x * F.silu(gate.to(torch.float32))
    mean = (h.pow(2).sum(-1, keepdim=True) + others) / (ranks * x.shape[-1])
    return weight * (h * torch.rsqrt(mean + EPS)).to(x.dtype)


@pytest.mark.parametrize("rows", [1, 2, 33, 256])
@pytest.mark.parametrize("width", [64, 96, 1000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bits_of_mixer2(dtype: torch.dtype, width: int, rows: int) -> None:
    """The gate is a slice of a wider projection, as in the models."""
    x, gate = inputs.make("normal", (rows, width), dtype, 1), inputs.make("normal", (rows, 3 * width), dtype, 2)
    gate, weight = gate[:, width : 2 * width], inputs.weights(width, dtype)
    others = inputs.make("normal", (rows, 1), torch.float32, 3).square() * width
    found = rmsnorm_of_part(x, weight, gate, EPS, 2, lambda sums: sums + others, numerics=TORCH_HF.name)
    assert torch.equal(found, mixer2(x, gate, weight, others, 2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_zeros_without_eps_are_nan_as_in_torch(backend: Backend, dtype: torch.dtype) -> None:
    x, z = backend.make("zeros", (6, 96), dtype), backend.make("normal", (6, 96), dtype, 2)
    theirs = F.rms_norm(x, (96,), None, 0.0).isnan()
    ours = rmsnorm_of_part(x, None, z, 0.0, 2, lambda sums: 2 * sums)
    assert theirs.any()
    assert torch.equal(ours.isnan(), theirs)
