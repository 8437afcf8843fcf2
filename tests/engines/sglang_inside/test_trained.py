"""The forward in training has the bits of SGLang's layers and functions, taken: by both methods of its classes."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from sglang.kernels.ops.attention.fla import fused_norm_gate, layernorm_gated
from sglang.srt.layers import layernorm as norms
from sglang.srt.layers.attention.mamba import mixer2_rms_norm_gated as mixer2
from sglang.srt.runtime_context import get_parallel

from norm_plugin import layers, settings
from norm_plugin.engines import sglang_gated, sglang_norms
from tests.engines.same_bits import Case, compare
from tests.engines.sglang_inside import trained
from tests.engines.sglang_inside.samples import DTYPES


@pytest.fixture(params=["forward_native", "forward_cuda"])
def method(request, hooks, monkeypatch):
    """Taken; what SGLang calls on a GPU is called here with tensors of a CPU."""
    monkeypatch.setattr(norms, "is_batch_invariant_mode_enabled", lambda: False)
    sglang_norms.hook(norms, hooks, request.param)
    sglang_gated.hook_layernorm_gated(layernorm_gated, hooks)
    sglang_gated.hook_fused_norm_gate(fused_norm_gate, hooks)
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_family_has_the_bits_of_the_engine(method, dtype):
    with settings.override(strict=True):
        found = [compare(case) for case in trained.cases(33, 96, dtype, method)]
    assert len(found) == (20 if method == "forward_cuda" else 21)
    assert {f.name: f.wrong for f in found if f.wrong} == {}
    assert {one for f in found for one in f.backends} == {"native"}
    without = 2  # a LayerNorm is rounded once in either numerics, and RMSNormWithoutScale has no weight
    assert sum(f.other_numerics_differ is True for f in found) == (
        0 if dtype == torch.float32 else len(found) - without
    )


@pytest.mark.parametrize("groups", [1, 3])
def test_mixer2(hooks, groups):
    """On one rank, which elsewhere a server says."""
    sglang_gated.hook_mixer2(mixer2, hooks, "forward_native")
    with get_parallel().override(tp_size=1, tp_rank=0):
        layer = mixer2.Mixer2RMSNormGated(96, groups, eps=1e-5).bfloat16().requires_grad_(False)
    layer.weight.copy_(torch.randn(96))
    make = partial(layers.RMSNormGated, 96, 1e-5, 96 // groups, dtype=torch.bfloat16)
    inputs = torch.randn(2, 33, 96).bfloat16().unbind()
    case = Case(
        "Mixer2", "gated_norm", layer.forward_native, lambda n: make(numerics=n), {"weight": layer.weight}, inputs
    )
    found = compare(case)
    assert (found.wrong, found.numerics, found.other_numerics_differ) == ([], "torch_hf", True)


def test_another_weight_is_seen(method):
    for case in trained.cases(3, 96, torch.bfloat16, method):
        if "weight" in case.weights:
            other = replace(case, weights=case.weights | {"weight": case.weights["weight"] * 1.01})
            assert any("elements differ" in wrong for wrong in compare(other).wrong), case.name
