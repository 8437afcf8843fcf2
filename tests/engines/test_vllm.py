"""The real vLLM on tiny models: stock against patched, bit for bit, with the calls counted.

Everything here runs in child processes that get the flags as a user sets them; only `vllm_wrong` has a hand in them.
"""

import functools
import re

import pytest

from tests.engines import runs
from tests.engines.runs import NATIVE, STOCK, TOKENS, Run, calls, furthest, model

#: Who normalizes in one forward: how often, by op.
CALLS = {
    "llama": {"rmsnorm": 1, "fused_add_rmsnorm": 6},
    "qwen3": {"rmsnorm": 1 + 6, "fused_add_rmsnorm": 6},
    "gemma2": {"rmsnorm": 1 + 6, "add_rmsnorm": 6},
    "gemma3": {"rmsnorm": 1 + 6 + 6, "add_rmsnorm": 6},
    "gpt2": {"layernorm": 7},
    "mamba2": {"rmsnorm": 1, "fused_add_rmsnorm": 2, "gated_norm": 2},
    "mamba2_groups": {"rmsnorm": 1, "fused_add_rmsnorm": 2, "gated_norm": 2},
    "qwen3_next": {"rmsnorm": 3, "add_rmsnorm": 8, "gated_norm": 3},
    "nemotron_h": {"rmsnorm": 1, "fused_add_rmsnorm": 5, "gated_norm": 2},
    "falcon_h1": {"rmsnorm": 5, "gated_norm": 2},
}


def per_forward(outcome):
    """Ours alone, and the reasons are none."""
    found = calls(outcome)
    assert all(reason == "" for _, reason in found), found
    assert all(number % TOKENS == 0 for number in found.values()), found
    return {op: number // TOKENS for (op, _), number in found.items()}


# --- eager --------------------------------------------------------------------------------------------------------


@functools.cache
def eager(*flags):
    found = Run("vllm", [model(name) for name in CALLS], dict(flags)).outcomes()
    return {outcome.model: outcome for outcome in found}


def stock():
    return eager()


def patched():
    return eager(*NATIVE.items())


@pytest.mark.parametrize("name", CALLS)
def test_the_same_bits(name):
    assert len(stock()[name].answers[0].tokens) == TOKENS
    assert len(stock()[name].answers[0].top[0]) > 1
    assert patched()[name].answers == stock()[name].answers


@pytest.mark.parametrize("name", CALLS)
def test_who_normalized(name):
    ours = patched()[name]
    assert per_forward(ours) == CALLS[name]
    assert ours.missing == {}
    assert all(row["layer"] for row in ours.rows if row["calls"])
    assert stock()[name].rows == []
    assert stock()[name].hooks == {}


@functools.cache
def wrong(kind):
    child = (str(runs.ROOT / "tests" / "engines" / "vllm_wrong.py"), kind)
    names = ("llama", "gemma3", "gpt2", "mamba2_groups")
    found = Run("vllm", [model(name) for name in names], NATIVE, child=child).outcomes()
    return {outcome.model: outcome for outcome in found}


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "mamba2_groups"])
@pytest.mark.parametrize("kind", ["scale", "eps"])
def test_a_wrong_norm_does_not_pass(kind, name):
    assert per_forward(wrong(kind)[name]) == CALLS[name]
    assert wrong(kind)[name].answers != stock()[name].answers
    assert furthest(wrong(kind)[name], stock()[name]) > 0


@functools.cache
def triton():
    return Run("vllm", [model("llama")], {"NORM_PLUGIN": "triton"}, "--dtype", "float32").outcomes()[0]


def test_triton_kernels_in_the_interpreter():
    native = Run("vllm", [model("llama")], NATIVE, "--dtype", "float32").outcomes()[0]
    assert per_forward(triton()) == CALLS["llama"]
    used = {name for row in triton().rows if row["calls"] for name in map(str, row["implementations"])}
    assert used
    assert all("triton" in name for name in used), used
    assert [answer.tokens for answer in triton().answers] == [answer.tokens for answer in native.answers]
    assert 0 < furthest(triton(), native) < 1e-5


def test_only_the_families_that_were_asked_for():
    flags = {**NATIVE, "NORM_PLUGIN_OPS": "qknorm,gated"}
    qwen3, qwen3_next = Run("vllm", [model("qwen3"), model("qwen3_next")], flags).outcomes()
    assert per_forward(qwen3) == {"rmsnorm": 6}
    assert {row["layer"].rpartition(".")[2] for row in qwen3.rows if row["calls"]} == {"q_norm", "k_norm"}
    assert per_forward(qwen3_next) == {"rmsnorm": 2, "gated_norm": 3}
    assert qwen3.answers == stock()["qwen3"].answers


# --- compiled -----------------------------------------------------------------------------------------------------

#: Inductor rounds where eager code does; otherwise it keeps more digits than any of us.
AS_EAGER = 'compilation_config={"inductor_compile_config": {"emulate_precision_casts": true}}'
COMPILED = ("llama", "gpt2", "mamba2_groups")


@functools.cache
def compiled(*flags):
    run = Run(
        "vllm", [model(name) for name in COMPILED], {"VLLM_LOGGING_LEVEL": "INFO", **dict(flags)},
        "--mode", "compiled", "--set", AS_EAGER,
    )  # fmt: skip
    found = {outcome.model: outcome for outcome in run.outcomes()}
    return found, re.findall(r"torch_aot_compile/([0-9a-f]+)", run.log.read_text())


ALL = (*NATIVE.items(), ("NORM_PLUGIN_SCOPE", "all"))


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_code_is_left_alone(name):
    ours = compiled(*NATIVE.items())[0][name]
    assert ours.answers == compiled()[0][name].answers
    assert calls(ours) == {}
    assert ours.hooks["RMSNorm"] == "RMSNorm.forward"


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_code_with_ours_in_it(name):
    ours = compiled(*ALL)[0][name]
    assert ours.answers == compiled()[0][name].answers
    added = {"fused_add_rmsnorm": "add_rmsnorm"}  # a graph is functional
    assert per_forward(ours) == {added.get(op, op): number for op, number in CALLS[name].items()}


def test_a_switch_never_loads_code_compiled_for_another():
    keys = [set(compiled(*flags)[1]) for flags in ((), tuple(NATIVE.items()), ALL)]
    assert all(len(found) == len(COMPILED) for found in keys), keys
    assert not keys[0] & keys[1]
    assert not keys[0] & keys[2]
    assert not keys[1] & keys[2]


# --- several processes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "mamba2_groups"])
def test_two_ranks(name):
    stock, ours = ranks(STOCK)[name], ranks(NATIVE)[name]
    assert ours.answers == stock.answers
    found = calls(ours)
    assert set(found) == {(op, "") for op in CALLS[name]}
    assert found["rmsnorm", ""] >= 2 * TOKENS * CALLS[name]["rmsnorm"]


def ranks(flags):
    return _ranks(tuple(flags.items()))


@functools.cache
def _ranks(flags):
    models = [model("llama"), model("mamba2_groups")]
    found = Run("vllm", models, dict(flags), "--processes", "--tp", "2").outcomes()
    return {outcome.model: outcome for outcome in found}
