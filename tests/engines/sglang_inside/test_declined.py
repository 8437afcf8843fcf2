"""What no kernel of ours can do is SGLang's own again, from its first call on, and is counted with the reason."""

import pytest
import torch
from sglang.srt.layers import layernorm as norms

from norm_plugin import kernels, settings
from norm_plugin.engines import call_counts, sglang_norms
from tests.engines.sglang_inside.samples import WIDTH, layer, tensor

REASON = "it is Sunday"
KINDS = ("RMSNorm", "GemmaRMSNorm", "Gemma3RMSNorm", "LayerNorm")
STOCK = {kind: getattr(norms, kind).forward_native for kind in KINDS}


@pytest.fixture
def no_kernel(hooks, monkeypatch):
    """A kernel was asked for, and refuses every call."""

    def refuse(*args):
        raise kernels.Refusal(REASON)

    monkeypatch.setattr(kernels, "unavailable", lambda device: "")
    monkeypatch.setattr(kernels, "find", lambda family, op: refuse)
    sglang_norms.hook(norms, hooks, "forward_native")
    with settings.override(backend="triton", strict=False):
        yield


@pytest.mark.parametrize("kind", KINDS)
def test_the_layer_runs_as_it_did(no_kernel, kind):
    norm, x = layer(kind), tensor(7, WIDTH)
    op = "layernorm" if kind == "LayerNorm" else "rmsnorm"
    for _ in range(2):
        assert torch.equal(norm.forward_native(x), STOCK[kind](norm, x))
    assert (call_counts.calls(op), call_counts.calls(op, REASON)) == (0, 2)


@pytest.mark.parametrize("kind", ["RMSNorm", "GemmaRMSNorm"])
def test_a_residual_is_added_once(no_kernel, kind):
    norm, x, residual = layer(kind), tensor(7, WIDTH), tensor(7, WIDTH)
    expected = STOCK[kind](norm, x.clone(), residual.clone())
    assert all(map(torch.equal, norm.forward_native(x, residual), expected))
    assert (call_counts.calls("add_rmsnorm"), call_counts.calls("add_rmsnorm", REASON)) == (0, 1)
