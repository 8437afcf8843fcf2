"""Why a hook will not meet a layer of vLLM, as the report and the log say it."""

import pytest
from torch import nn
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, LayerNorm, RMSNorm
from vllm.model_executor.models import commandr
from vllm.third_party.flash_linear_attention.ops.layernorm_guard import RMSNormGated

from norm_plugin import settings
from norm_plugin.engines import call_counts, model_layers
from norm_plugin.engines import vllm as adapter
from norm_plugin.engines.installed_hooks import installed


class OverridesForward(RMSNorm):
    def forward(self, x, residual=None):
        return x


class Inherits(RMSNorm):
    pass


class Compiled(nn.Module):
    """What vLLM's decorator makes of a model: it says whether it is compiled."""

    def __init__(self, do_not_compile):
        super().__init__()
        self.do_not_compile = do_not_compile
        self.norm = RMSNorm(8)
        self.own = commandr.LayerNorm((8,))


def model():
    found = nn.Module()
    found.rms, found.q_norm, found.gemma, found.layer = RMSNorm(8), RMSNorm(8), GemmaRMSNorm(8), LayerNorm(8)
    found.cohere, found.torchs = commandr.LayerNorm((8,)), nn.LayerNorm(8)
    found.calls_a_function = RMSNormGated(8)
    found.inherits, found.overrides = Inherits(8), OverridesForward(8)
    found.compiled, found.eager = Compiled(False), Compiled(True)
    return found


def reasons(made):
    adapter.qk_norms.learn(made)
    call_counts.name_layers(made, adapter._why(installed["vllm"], made))
    return {layer.path: layer.why for layer in call_counts.layers()}


NO_HOOK = "no hook of norm_plugin takes this class"


def test_reasons(native):
    made = model()
    assert reasons(made) == {
        **dict.fromkeys(("rms", "q_norm", "gemma", "layer", "inherits", "eager.norm", "calls_a_function"), ""),
        "compiled.norm": "compiled by vLLM",
        "cohere": NO_HOOK, "compiled.own": NO_HOOK, "eager.own": NO_HOOK,
        "torchs": "PyTorch's own class; norm_plugin takes those of the engine",
        "overrides": f"{__name__}.OverridesForward has a forward of its own, which no hook takes",
    }  # fmt: skip
    (own,) = {layer.kind for layer in call_counts.layers() if layer.path == "cohere"}
    assert own == "vllm.model_executor.models.commandr.LayerNorm"
    said = model_layers.described(call_counts.layers())
    assert "1 LayerNorm (ours)" in said
    assert f"3 vllm.model_executor.models.commandr.LayerNorm ({NO_HOOK})" in said


@pytest.mark.parametrize("ops", [{"qknorm"}, {"gemma", "rmsnorm"}])
def test_families_that_were_not_asked_for(ops):
    with settings.override(backend="native", ops=frozenset(ops)):
        adapter.register()
        found = reasons(model())
    families = {
        "rms": "rmsnorm",
        "q_norm": "qknorm",
        "gemma": "gemma",
        "layer": "layernorm",
        "calls_a_function": "gated",
    }
    for layer, family in families.items():
        assert found[layer] == ("" if family in ops else f"NORM_PLUGIN_OPS leaves the family {family} out"), layer


def test_a_folder_that_cannot_be_written_is_said_at_registration(tmp_path, caplog):
    (tmp_path / "file").touch()
    with settings.override(backend="native", report=str(tmp_path / "file")):
        adapter.register()
    assert any("the report cannot be written" in line and str(tmp_path) in line for line in caplog.messages)
