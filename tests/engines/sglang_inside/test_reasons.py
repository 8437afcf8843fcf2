"""Why a hook will not meet a layer of SGLang, as the report and the log say it."""

import pytest
from sglang.kernels.ops.attention.fla import layernorm_gated
from sglang.srt import utils
from sglang.srt.layers import layernorm as norms
from sglang.srt.layers.attention.mamba import mixer2_rms_norm_gated as mixer2
from sglang.srt.models import commandr
from torch import nn

from norm_plugin import settings
from norm_plugin.engines import call_counts, qk_norms, sglang, sglang_norms
from norm_plugin.engines.installed_hooks import installed
from tests.engines.sglang_inside.samples import layer


class Overrides(norms.RMSNorm):
    def forward_native(self, x, residual=None):
        return x


class Inherits(norms.RMSNorm):
    pass


def model():
    found = nn.Module()
    found.rms, found.q_norm, found.gemma, found.layer = norms.RMSNorm(8), norms.RMSNorm(8), norms.GemmaRMSNorm(8), None
    found.layer = layer("LayerNorm")
    found.cohere, found.torchs = commandr.LayerNorm((8,)), nn.LayerNorm(8)
    found.inherits, found.overrides = Inherits(8), Overrides(8)
    return found


def reasons(hooks):
    made = model()
    qk_norms.learn(made)
    call_counts.name_layers(made, lambda one: sglang._why(hooks, one))
    return {layer.path: layer.why for layer in call_counts.layers()}


def test_reasons(hooks):
    sglang_norms.hook(norms, hooks, "forward_native")
    assert reasons(hooks) == {
        **dict.fromkeys(("rms", "q_norm", "gemma", "layer", "inherits"), ""),
        "cohere": "no hook of norm_plugin takes this class",
        "torchs": "PyTorch's own class; norm_plugin takes those of the engine",
        "overrides": f"{__name__}.Overrides has a forward_native of its own, which no hook takes",
    }
    (own,) = {layer.kind for layer in call_counts.layers() if layer.path == "cohere"}
    assert own == "sglang.srt.models.commandr.LayerNorm"


@pytest.mark.parametrize("ops", [{"qknorm"}, {"gemma", "rmsnorm"}])
def test_families_that_were_not_asked_for(hooks, ops):
    with settings.override(ops=frozenset(ops)):
        sglang_norms.hook(norms, hooks, "forward_native")
        found = reasons(hooks)
    families = {"rms": "rmsnorm", "q_norm": "qknorm", "gemma": "gemma", "layer": "layernorm"}
    for path, family in families.items():
        assert found[path] == ("" if family in ops else f"NORM_PLUGIN_OPS leaves the family {family} out"), path


def test_a_machine_with_norms_of_its_own_has_that_for_a_reason(monkeypatch):
    monkeypatch.setattr(utils, "cpu_has_amx_support", lambda: True)
    sglang.register()
    hooks = installed["sglang"]
    for module in (norms, mixer2, layernorm_gated):
        assert hooks.missing[module.__name__] == "this machine has norms of its own (AMX, ROCm, NPU, XPU or MUSA)"
    assert hooks.live.keys().isdisjoint({"RMSNorm", "Mixer2RMSNormGated", "layernorm_gated"})
    assert reasons(hooks)["rms"] == "this machine has norms of its own (AMX, ROCm, NPU, XPU or MUSA)"
    sglang.undo()
    assert "sglang" not in installed
