"""The forward in training has the bits of vLLM's patched layers."""

from dataclasses import replace

import pytest
import torch

from norm_plugin.engines import call_counts
from tests.engines.same_bits import compare
from tests.engines.vllm_inside import trained

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_family_has_the_bits_of_the_engine(native, dtype):
    found = [compare(case) for case in trained.cases(65, 96, dtype)]
    assert len(found) == (20 if dtype == torch.float32 else 22)
    assert {f.name: f.wrong for f in found if f.wrong} == {}
    assert {backend for f in found for backend in f.backends} == {"native"}
    assert sum(f.other_numerics_differ is True for f in found) == (0 if dtype == torch.float32 else 21)


def test_what_is_not_taken_is_no_evidence():
    """vLLM's own answer, which on a CPU may have the same bits."""
    case = next(trained.cases(3, 96, torch.bfloat16))
    (wrong,) = compare(case).wrong
    assert wrong.startswith("the engine's layer was not taken")
    assert call_counts.rows() == ()


def test_another_weight_is_seen(native):
    for case in trained.cases(3, 96, torch.bfloat16):
        other = replace(case, weights=case.weights | {"weight": case.weights["weight"] * 1.01})
        assert any("elements differ" in wrong for wrong in compare(other).wrong), case.name
