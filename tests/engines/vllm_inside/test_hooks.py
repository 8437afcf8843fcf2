"""What the adapter changes in vLLM, what it does where something is missing, and the way back."""

import importlib.util
import logging
import sys

import pytest
import torch
import vllm
from vllm import envs, ir
from vllm.model_executor.layers import layernorm
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, LayerNorm, RMSNorm, RMSNormGated
from vllm.model_executor.layers.mamba.mamba_mixer2 import Mixer2RMSNormGated
from vllm.platforms import current_platform

from norm_plugin import settings
from norm_plugin.dispatch import BackendError
from norm_plugin.engines import call_counts, vllm_ir
from norm_plugin.engines import vllm as adapter
from norm_plugin.engines.installed_hooks import installed

CLASSES = [RMSNorm, GemmaRMSNorm, LayerNorm, RMSNormGated, Mixer2RMSNormGated]


def everything():
    """What the adapter may touch."""
    found = {cls.__name__: dict(vars(cls)) for cls in [*CLASSES, type(current_platform)]}
    found["envs"] = dict(envs.environment_variables)
    found["providers"] = {name: dict(getattr(ir.ops, name).impls) for name in vllm_ir.OPS}
    found["finders"] = list(sys.meta_path)
    found["log"] = logging.getLogger("norm_plugin").parent
    return found


@pytest.mark.parametrize("scope", ["eager", "all"])
def test_undo(scope):
    before = everything()
    with settings.override(backend="native", scope=scope):
        adapter.register()
        during = everything()
        adapter.register()
        assert everything() == during
    assert [name for name in before if before[name] != during[name]]
    assert all("forward" in vars(cls) for cls in CLASSES)
    adapter.undo()
    assert everything() == before
    assert "vllm" not in installed


def test_off_is_inert():
    before = everything()
    with settings.override(backend="off"):
        adapter.register()
    assert everything() == before
    assert "vllm" not in installed


def test_forward_native_is_never_touched(native):
    assert all("norm_plugin" not in vars(cls)["forward_native"].__module__ for cls in CLASSES)


def test_flags_are_in_the_key_of_compiled_code():
    assert "NORM_PLUGIN_FINGERPRINT" not in envs.compile_factors()
    with settings.override(backend="native"):
        adapter.register()
    assert {"NORM_PLUGIN", "NORM_PLUGIN_SCOPE", "NORM_PLUGIN_FINGERPRINT"} <= set(envs.compile_factors())


def test_a_class_that_is_not_there(monkeypatch, caplog):
    monkeypatch.delattr(layernorm, "GemmaRMSNorm")
    with settings.override(backend="native"):
        adapter.register()
    assert installed["vllm"].missing == {"GemmaRMSNorm": "vllm.model_executor.layers.layernorm has no GemmaRMSNorm"}
    said = [r.message for r in caplog.records if r.levelno == logging.WARNING and "GemmaRMSNorm" in r.message]
    assert said == [
        f"norm_plugin: GemmaRMSNorm of vLLM {vllm.__version__} stays as it is: "
        "vllm.model_executor.layers.layernorm has no GemmaRMSNorm"
    ]
    GemmaRMSNorm(8)(torch.ones(2, 8))
    RMSNorm(8)(torch.ones(2, 8))
    assert call_counts.calls("rmsnorm") == 1


def test_a_vllm_of_another_build(monkeypatch):
    before = everything()
    monkeypatch.delattr(ir.ops, "rms_norm")
    with settings.override(backend="native"):
        adapter.register()
    monkeypatch.undo()
    assert list(installed["vllm"].missing) == ["everything"]
    assert installed["vllm"].live == {}
    assert everything() == before


def test_strict_wants_every_hook(monkeypatch):
    monkeypatch.delattr(layernorm, "GemmaRMSNorm")
    with settings.override(backend="native", strict=True), pytest.raises(BackendError, match="has no GemmaRMSNorm"):
        adapter.register()


def test_batch_invariance_is_vllms(monkeypatch):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    with settings.override(backend="native"):
        adapter.register()
        RMSNorm(64)(torch.randn(2, 64))
    assert call_counts.rows() == ()
    assert "VLLM_BATCH_INVARIANT=1" in installed["vllm"].missing["everything"]


@pytest.mark.parametrize("scope", ["eager", "all"])
def test_without_the_ir(monkeypatch, scope):
    """vLLM 0.34 has none."""
    x, residual = torch.randn(2, 5, 64).bfloat16()
    layer = RMSNorm(64, dtype=torch.bfloat16)
    layer.weight.data.normal_()
    stock = layer(x), *layer(x.clone(), residual.clone())
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *of: None if name == "vllm.ir" else find(name, *of))
    monkeypatch.setitem(sys.modules, "vllm.ir", None)
    monkeypatch.delattr(vllm, "ir")
    with settings.override(backend="native", scope=scope):
        adapter.register()
        ours = layer(x), *layer(x.clone(), residual.clone())
    assert installed["vllm"].missing == {}
    assert not [hook for hook in installed["vllm"].live if hook.startswith("ir")]
    assert all(map(torch.equal, stock, ours))
    assert call_counts.calls("rmsnorm") == call_counts.calls("fused_add_rmsnorm") == 1


# --- the IR provider ----------------------------------------------------------------------------------------------


def priority(config):
    return type(current_platform).get_default_ir_op_priority(config).rms_norm


def test_the_provider_is_first_only_if_asked(config):
    with settings.override(backend="native"):
        adapter.register()
        assert priority(config)[0] != "norm_plugin"
        adapter.undo()
    with settings.override(backend="native", scope="all"):
        adapter.register()
        assert priority(config)[0] == "norm_plugin"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("hidden", [64, 769])
@pytest.mark.parametrize("eps", [1e-6, 1e-5])
def test_the_provider_agrees_with_vllms_native(native, dtype, hidden, eps):
    x, residual = torch.randn(2, 17, hidden).to(dtype)
    weight = torch.randn(hidden).to(dtype)
    for op, inputs in ((ir.ops.rms_norm, (x,)), (ir.ops.fused_add_rms_norm, (x, residual))):
        ours, theirs = op.impls["norm_plugin"], op.impls["native"]
        for w in (weight, None):
            assert ours.supports_args(*inputs, w, eps) is True
            assert ours.supports_args(*inputs, w, eps, 4) is False
            before = [t.clone() for t in inputs]
            found, expected = ours.impl_fn(*inputs, w, eps), theirs.impl_fn(*inputs, w, eps)
            assert all(map(torch.equal, inputs, before))
            for one, other in zip(*[v if isinstance(v, tuple) else (v,) for v in (found, expected)], strict=True):
                assert torch.equal(one, other)
        with op.set_priority(["norm_plugin", "native"]):
            assert op.dispatch(*inputs, weight, eps).provider == "norm_plugin"
