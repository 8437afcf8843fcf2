"""What no kernel of ours can do is vLLM's own again, from its first call on, and is counted with the reason."""

import pytest
import torch
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, LayerNorm, RMSNorm

from norm_plugin import functions, kernels, settings
from norm_plugin.dispatch import BackendError
from norm_plugin.engines import call_counts
from norm_plugin.engines import vllm as adapter

REASON = "it is Sunday"
STOCK = {cls: cls.forward for cls in (RMSNorm, GemmaRMSNorm, LayerNorm)}


@pytest.fixture
def no_kernel(monkeypatch):
    """A kernel was asked for, and refuses every call."""

    def refuse(*args):
        raise kernels.Refusal(REASON)

    monkeypatch.setattr(kernels, "unavailable", lambda device: "")
    monkeypatch.setattr(kernels, "find", lambda family, op: refuse)
    with settings.override(backend="triton"):
        adapter.register()
        yield


@pytest.mark.parametrize("cls", STOCK)
def test_the_layer_runs_as_it_did(no_kernel, cls):
    norm, x = cls(64).bfloat16(), torch.randn(5, 64, dtype=torch.bfloat16)
    op = "layernorm" if cls is LayerNorm else "rmsnorm"
    for _ in range(2):
        assert torch.equal(norm(x), STOCK[cls](norm, x))
    assert (call_counts.calls(op), call_counts.calls(op, REASON)) == (0, 2)


def test_a_residual_is_added_once(no_kernel):
    norm, x, residual = RMSNorm(64).bfloat16(), *torch.randn(2, 5, 64, dtype=torch.bfloat16)
    expected = STOCK[RMSNorm](norm, x.clone(), residual.clone())
    found = norm(x, residual)
    assert all(map(torch.equal, found, expected))
    assert (call_counts.calls("fused_add_rmsnorm"), call_counts.calls("fused_add_rmsnorm", REASON)) == (0, 1)


def test_a_kernel_that_dies_at_its_launch_is_given_up(monkeypatch):
    """Found out before anything is written."""

    def bind(*args):
        def run(*args):
            raise kernels.NotLaunched("no compiler") from RuntimeError("ptxas died")

        return kernels.Bound(run)

    monkeypatch.setattr(kernels, "unavailable", lambda device: "")
    monkeypatch.setattr(kernels, "find", lambda family, op: bind)
    with settings.override(backend="triton"):
        adapter.register()
        norm, x, residual = RMSNorm(64).bfloat16(), *torch.randn(2, 5, 64, dtype=torch.bfloat16)
        for _ in range(2):
            pair = x.clone(), residual.clone()
            assert all(map(torch.equal, norm(*pair), STOCK[RMSNorm](norm, x.clone(), residual.clone())))
    reason = "the Triton kernel failed: RuntimeError: ptxas died"
    assert (call_counts.calls("fused_add_rmsnorm"), call_counts.calls("fused_add_rmsnorm", reason)) == (0, 2)


def test_a_direct_call_has_the_native_op(no_kernel):
    x = torch.randn(5, 64)
    with settings.override(backend="native"):
        expected = functions.rmsnorm(x, None)
    assert torch.equal(functions.rmsnorm(x, None), expected)


def test_strict_raises(no_kernel):
    with settings.override(strict=True), pytest.raises(BackendError, match=REASON):
        RMSNorm(64).bfloat16()(torch.randn(5, 64, dtype=torch.bfloat16))
