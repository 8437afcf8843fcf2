"""The real SGLang on tiny models: stock against patched, with the calls counted in the scheduler's process."""

import functools

import pytest

from tests.engines.sglang_runs import NATIVE, TOKENS, in_schedulers, model, side_by_side

FORWARDS = TOKENS  # one of all prompts, and one for each further token

#: Who normalizes in a forward: op and reason, and how often.
CALLS = {
    "llama": {("rmsnorm", ""): 1, ("add_rmsnorm", ""): 6},
    "qwen3": {("rmsnorm", ""): 1 + 6, ("add_rmsnorm", ""): 6},
    "gemma3": {("rmsnorm", ""): 3 * 6 + 1},
    "gpt2": {("layernorm", "torch.nn.LayerNorm"): 7},
    "nemotron_h": {("rmsnorm", ""): 1, ("add_rmsnorm", ""): 5, ("gated_norm", ""): 2},
    "falcon_h1": {("rmsnorm", ""): 2, ("gated_norm", ""): 2},
}


@functools.cache
def runs():
    return side_by_side([model(name) for name in CALLS], NATIVE)


@pytest.mark.parametrize("name", CALLS)
def test_the_same_bits(name):
    stock, ours = runs()[name]
    assert len(ours.answers[0].tokens) == TOKENS
    assert ours.answers == stock.answers


@pytest.mark.parametrize("name", CALLS)
def test_who_normalized(name):
    stock, ours = runs()[name]
    assert in_schedulers(ours) == {key: number * FORWARDS for key, number in CALLS[name].items()}
    assert stock.rows == []
    assert ours.missing == {}
    assert all(row["layer"] for row in ours.rows if row["calls"])
