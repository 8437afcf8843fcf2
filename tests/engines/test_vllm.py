"""The real vLLM on tiny models: stock against patched, bit for bit, with the calls counted.

Bits are compared where they are the same by construction, on whatever processor: where both sides call the same
functions of PyTorch on the same values, or run the same compiled code. Inductor's own norms are neither: see
tests/spec/test_inductor.py.

Everything here runs in child processes that get the flags as a user sets them; only `vllm_wrong` has a hand in them.
"""

import functools
import re
from pathlib import Path

import pytest

from tests.engines.runs import NATIVE, ROOT, STOCK, TOKENS, Run, calls, furthest, model, side_by_side

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
def eager():
    models = [model(name) for name in CALLS]
    # not at once: vLLM looks at each architecture in a process that imports all of it, and then keeps what it saw
    stock, ours = (Run("vllm", models, flags).outcomes() for flags in (STOCK, NATIVE))
    return {one.model: (one, other) for one, other in zip(stock, ours, strict=True)}


def stock():
    return {name: pair[0] for name, pair in eager().items()}


def patched():
    return {name: pair[1] for name, pair in eager().items()}


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


WRONG = ("llama", "gemma3", "gpt2", "mamba2_groups")


@functools.cache
def wrong():
    child = str(ROOT / "tests" / "engines" / "vllm_wrong.py")
    models = [model(name) for name in WRONG]
    started = {kind: Run("vllm", models, NATIVE, child=(child, kind)) for kind in ("scale", "eps")}
    return {kind: {outcome.model: outcome for outcome in run.outcomes()} for kind, run in started.items()}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("kind", ["scale", "eps"])
def test_a_wrong_norm_does_not_pass(kind, name):
    ours = wrong()[kind][name]
    assert per_forward(ours) == CALLS[name]
    assert ours.answers != stock()[name].answers
    assert furthest(ours, stock()[name]) > 0


def test_triton_kernels_in_the_interpreter():
    found = side_by_side("vllm", [model("llama")], {"NORM_PLUGIN": "triton"}, "--dtype", "float32")
    stock, ours = found["llama"]
    assert per_forward(ours) == CALLS["llama"]
    used = {ran["backend"] for row in ours.rows if row["calls"] for ran in row["implementations"]}
    assert used == {"triton"}
    assert [answer.tokens for answer in ours.answers] == [answer.tokens for answer in stock.answers]
    assert 0 < furthest(ours, stock) < 1e-5  # a sum in another order


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
ALL = {**NATIVE, "NORM_PLUGIN_SCOPE": "all"}
SCOPES = {"stock": STOCK, "eager": NATIVE, "opaque": STOCK, "all": ALL}


@functools.cache
def compiled():
    """By scope: the outcome of each model, and the folders of vLLM's cache, named by their keys, with their code.

    "opaque" is vLLM without us whose own norms are opaque ops in the compiled code, as ours are under "all".
    """
    started = {}
    for scope, flags in SCOPES.items():
        models = [model(name) for name in (COMPILED[:1] if scope in ("stock", "eager") else COMPILED)]
        told = {**flags, "VLLM_LOGGING_LEVEL": "INFO"}
        child = (str(ROOT / "tests" / "engines" / "vllm_opaque.py"),) if scope == "opaque" else ()
        started[scope] = Run("vllm", models, told, "--mode", "compiled", "--set", AS_EAGER, child=child)
    found = {scope: {outcome.model: outcome for outcome in run.outcomes()} for scope, run in started.items()}
    kept = re.compile(r"/\S*torch_aot_compile/[0-9a-f]+")
    return found, {scope: set(kept.findall(run.log.read_text())) for scope, run in started.items()}


def test_compiled_code_is_left_alone():
    stock, ours = (compiled()[0][scope]["llama"] for scope in ("stock", "eager"))
    assert ours.answers == stock.answers
    assert calls(ours) == {}
    assert ours.hooks["RMSNorm"] == "RMSNorm.forward"


def test_the_code_that_inductor_generates_is_the_same():
    """Its files are named after what is in them. On a GPU each process tunes them for itself, so bits may differ."""
    code = {
        scope: {file.name for folder in folders for file in Path(folder).glob("inductor_cache/*/*.py")}
        for scope, folders in compiled()[1].items()
    }
    assert code["eager"]
    assert code["eager"] <= code["stock"]
    assert not code["stock"] <= code["all"]


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_code_with_ours_in_it(name):
    """The bits of vLLM's own norms, called in the same places of the same compiled code.

    Not those of vLLM's compiled code as it is, in which Inductor has made the norms part of its loops and sums a row in
    an order of its own, by the vectors of the processor. About three bf16 values in 100,000 of a norm are rounded the
    other way for that, whoever wrote the norm. In these prompts a logit shows it on one processor and none on another:
    equal bits there would be luck.
    """
    own, ours = (compiled()[0][scope][name] for scope in ("opaque", "all"))
    assert len(own.answers[0].tokens) == TOKENS
    assert own.rows == []
    assert ours.answers == own.answers
    added = {"fused_add_rmsnorm": "add_rmsnorm"}  # a graph is functional
    assert per_forward(ours) == {added.get(op, op): number for op, number in CALLS[name].items()}


def test_a_wrong_norm_in_compiled_code_does_not_pass():
    """The code that the run above has compiled, around a norm whose eps is ten times larger."""
    own = compiled()[0]["opaque"]["gpt2"]
    child = (str(ROOT / "tests" / "engines" / "vllm_wrong.py"), "inside")
    (ours,) = Run("vllm", [model("gpt2")], ALL, "--mode", "compiled", "--set", AS_EAGER, child=child).outcomes()
    assert per_forward(ours) == CALLS["gpt2"]
    assert ours.answers != own.answers
    assert furthest(ours, own) > 0


def test_a_switch_never_loads_code_compiled_for_another():
    found, kept = compiled()
    assert {scope: len(folders) for scope, folders in kept.items()} == {
        scope: len(models) for scope, models in found.items()
    }
    assert len(set.union(*kept.values())) == sum(map(len, kept.values()))


# --- several processes --------------------------------------------------------------------------------------------


#: Of two ranks: groups within a rank are as on one, one group across them takes two ops and an all-reduce between. The
#: all-reduce before a norm is one op with it, which Gemma 3 counts for the norm after a block and for the next one.
#: test_sglang has Llama on two ranks.
ON_TWO = {
    "mamba2_groups": {"rmsnorm": 1, "allreduce_add_rmsnorm": 2, "gated_norm": 2},
    "mamba2": {"rmsnorm": 1, "allreduce_add_rmsnorm": 2, "split_sums": 2, "split_rmsnorm": 2},
    "qwen3": {"rmsnorm": 1 + 6, "allreduce_add_rmsnorm": 6},
    "gemma3": {"rmsnorm": 1 + 6, "allreduce_norm_add_norm": 6 + 6},
}
TWO = ("--processes", "--tp", "2")


def assert_calls_on_two_ranks(name, outcome):
    """As often as vLLM forwards, which is at least once a token, on each rank; and no all-reduce without its norm."""
    found = calls(outcome)
    forwards = found["rmsnorm", ""] // ON_TWO[name]["rmsnorm"]
    assert forwards >= 2 * TOKENS
    assert found == {(op, ""): forwards * number for op, number in ON_TWO[name].items()}


@pytest.mark.parametrize("name", ON_TWO)
def test_two_ranks(name):
    """The bits of vLLM's norms behind the native twin of our all-reduce."""
    twin, ours = ranks()[name]
    assert len(twin.answers[0].tokens) == TOKENS
    assert twin.rows == []
    assert ours.answers == twin.answers
    assert_calls_on_two_ranks(name, ours)


@functools.cache
def ranks():
    """By model: vLLM without us whose linear layers sum over ranks as our twin does, and ours."""
    models = [model(name) for name in ON_TWO]
    twin = Run("vllm", models, STOCK, *TWO, child=(str(ROOT / "tests" / "engines" / "vllm_twin.py"),))
    ours = Run("vllm", models, NATIVE, *TWO)
    return {one.model: (one, other) for one, other in zip(twin.outcomes(), ours.outcomes(), strict=True)}


def test_a_rank_that_leaves_out_the_others_does_not_pass():
    child = (str(ROOT / "tests" / "engines" / "vllm_wrong.py"), "alone")
    (ours,) = Run("vllm", [model("mamba2")], NATIVE, *TWO, child=child).outcomes()
    assert_calls_on_two_ranks("mamba2", ours)
    twin, _ = ranks()["mamba2"]
    assert furthest(ours, twin) > 0
