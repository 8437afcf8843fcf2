"""SGLang's Mixer2 norm of one group across two ranks: the bits of its own, by both of its methods.

SGLang 0.5.17 loads no such model on a CPU (its loader cannot split one group's weights there), so this is its class,
with what the other rank would have sent.
"""

import pytest
import torch
from sglang.srt.layers.attention.mamba import mixer2_rms_norm_gated as mixer2
from sglang.srt.runtime_context import get_parallel

from norm_plugin import settings
from norm_plugin.dispatch import BackendError
from norm_plugin.engines import call_counts, sglang_gated
from tests.engines.sglang_inside.samples import DTYPES, tensor

ROWS, WIDTH = 7, 96


@pytest.fixture(params=["forward_native", "forward_cuda"])
def method(request, monkeypatch):
    """SGLang's two all-reduces, which are not of the same ranks, add other things."""
    others = torch.rand(2, ROWS, 1) * WIDTH
    monkeypatch.setattr(mixer2, "tensor_model_parallel_all_reduce", lambda sums: sums + others[0])
    monkeypatch.setattr(mixer2, "attn_tp_all_reduce", lambda sums: sums + others[1])
    return request.param


def half(groups, dtype=torch.bfloat16, **how):
    """The layer of the first of two ranks."""
    with get_parallel().override(tp_size=2, tp_rank=0):
        layer = mixer2.Mixer2RMSNormGated(2 * WIDTH, groups, eps=1e-5, **how).to(dtype).requires_grad_(False)
    for weight in layer.parameters():
        weight.copy_(torch.randn(WIDTH) * 0.3 + 1)
    return layer


@pytest.mark.parametrize("of_attention", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_group_across_two_ranks(hooks, method, dtype, of_attention):
    layer = half(1, dtype)
    layer.use_attn_tp_group = of_attention
    x, gate = tensor(ROWS, WIDTH, dtype=dtype), tensor(ROWS, 3 * WIDTH, dtype=dtype)[:, WIDTH : 2 * WIDTH]
    stock = getattr(layer, method)(x, gate)
    sglang_gated.hook_mixer2(mixer2, hooks, method)
    with settings.override(strict=True):
        ours = getattr(layer, method)(x, gate)
    assert torch.equal(ours, stock)
    assert call_counts.calls("split_sums") == call_counts.calls("split_rmsnorm") == 1
    layer.use_attn_tp_group = not of_attention
    assert not torch.equal(getattr(layer, method)(x, gate), stock)


@pytest.mark.parametrize("left", ["3 groups", "no norm"])
def test_what_stays_sglangs(hooks, method, left, monkeypatch):
    monkeypatch.setattr(mixer2, "tensor_model_parallel_all_gather", lambda x, dim: torch.cat([x, x], dim))
    layer = half(3) if left == "3 groups" else half(1, use_rms_norm=False)
    x, gate = tensor(ROWS, WIDTH), tensor(ROWS, WIDTH)
    stock = getattr(layer, method)(x, gate)
    sglang_gated.hook_mixer2(mixer2, hooks, method)
    assert torch.equal(getattr(layer, method)(x, gate), stock)
    reason = "groups of which some are spread over ranks" if left == "3 groups" else "a gate without a norm"
    assert call_counts.calls("gated_norm", reason) == 1
    with settings.override(strict=True), pytest.raises(BackendError, match=reason):
        getattr(layer, method)(x, gate)
