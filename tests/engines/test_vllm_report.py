"""What the report says of the real vLLM's layers that ours do not run: compiled, without a hook, or left out."""

import functools
import json

from norm_plugin.engines import report_reader
from tests.engines import runs
from tests.engines.runs import NATIVE, Run, model

NORMS = 7
#: As far as vLLM's Cohere asks; its LayerNorm is a class of its own that no hook takes.
COHERE = {
    "architectures": ["CohereForCausalLM"], "model_type": "cohere", "hidden_size": 128, "intermediate_size": 256,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 512, "use_qk_norm": True,
    "max_position_embeddings": 512, "logit_scale": 0.1, "layer_norm_eps": 1e-5, "torch_dtype": "bfloat16",
}  # fmt: skip
OWN = "vllm.model_executor.models.commandr.LayerNorm"
NO_HOOK = "no hook of norm_plugin takes this class"


@functools.cache
def reports():
    """By model: the process that ran it, and what its log says."""
    place = runs.folder() / "reports"
    cohere = place / "cohere"
    cohere.mkdir(parents=True)
    (cohere / "config.json").write_text(json.dumps(COHERE))
    started = {
        "llama": Run("vllm", [model("llama")], flags(place / "llama"), "--mode", "compiled"),
        "cohere": Run("vllm", [cohere], flags(place / "of-cohere"), "--set", 'load_format="dummy"'),
    }
    for run in started.values():
        run.outcomes()
    folders = {"llama": place / "llama", "cohere": place / "of-cohere"}
    return {name: (*report_reader.read(folder), started[name].log.read_text()) for name, folder in folders.items()}


def flags(folder):
    return {**NATIVE, "NORM_PLUGIN_REPORT": str(folder), "VLLM_LOGGING_LEVEL": "INFO"}


def test_what_vllm_compiles_has_that_for_a_reason():
    process, log = reports()["llama"]
    silent = [row for row in process["rows"] if not row["op"]]
    assert [row["reason"] for row in silent] == ["compiled by vLLM"] * NORMS
    assert {row["class"] for row in silent} == {"vllm.model_executor.layers.layernorm.RMSNorm"}
    assert f"LlamaForCausalLM has {NORMS} vllm.model_executor.layers.layernorm.RMSNorm (compiled by vLLM)" in log
    (described,) = process["models"]
    assert described == f"{model('llama')} (LlamaForCausalLM)"


def test_a_layer_that_no_hook_takes_has_its_class_and_that_reason():
    process, log = reports()["cohere"]
    rows = {row["layer"]: (row["class"], row["op"], row["reason"]) for row in process["rows"]}
    assert set(rows) == {
        "model.norm",
        *(f"model.layers.{i}.{name}" for i in range(2)
          for name in ("input_layernorm", "self_attn.q_norm", "self_attn.k_norm")),
    }  # fmt: skip
    assert set(rows.values()) == {(OWN, "", NO_HOOK)}
    assert f"7 {OWN} ({NO_HOOK})" in log
