"""The real SGLang on ranks that meet over gloo: our norms complete its sums. Two ranks have every bit as without us.

More ranks differ in what they round: gloo rounds the sum of some of them, and ours only the sum of all.
"""

import functools

import pytest

from norm_plugin.engines.sglang_ranks import NOT_AT_SEAM
from tests.engines.sglang_runs import NATIVE, TOKENS, furthest, in_schedulers, model, side_by_side

RANKS, FORWARDS = 2, TOKENS  # one of all prompts, and one for each further token

#: What a rank does in a forward: op and reason, and how often. The sums apart are the embedding's and the last layer's.
APART = {("allreduce", NOT_AT_SEAM): 2, ("add_rmsnorm", ""): 1}
CALLS = {
    "llama": {("allreduce_add_rmsnorm", ""): 5, ("rmsnorm", ""): 1, **APART},
    "qwen3": {("allreduce_add_rmsnorm", ""): 5, ("rmsnorm", ""): 1 + 6, **APART},
    "nemotron_h": {("allreduce_add_rmsnorm", ""): 4, ("rmsnorm", ""): 1, ("gated_norm", ""): 2, **APART},
    "falcon_h1": {
        ("allreduce_add_rmsnorm", ""): 2, ("rmsnorm", ""): 1, ("gated_norm", ""): 2,
        ("allreduce", NOT_AT_SEAM): 3, ("add_rmsnorm", ""): 2,  # its feed-forwards complete their own sums
    },
    "qwen3_next": {("allreduce_add_rmsnorm", ""): 7, ("rmsnorm", ""): 3, ("gated_norm", ""): 3, **APART},
}  # fmt: skip
DETERMINISTIC = ("llama", "qwen3")


@functools.cache
def sides(mode):
    """Stock and patched, at the same time."""
    names = DETERMINISTIC if mode == "deterministic" else CALLS
    how = ["--set", "enable_deterministic_inference=true"] if mode == "deterministic" else []
    return side_by_side([model(name) for name in names], NATIVE, "--tp", str(RANKS), *how)


CASES = [("default", name) for name in CALLS] + [("deterministic", name) for name in DETERMINISTIC]


@pytest.mark.parametrize(("mode", "name"), CASES)
def test_the_same_bits(mode, name):
    stock, ours = sides(mode)[name]
    assert len(ours.answers[0].tokens) == TOKENS
    if name == "qwen3_next":  # its stock gated norm is an interpreted kernel, which sums in another order
        assert [answer.tokens for answer in ours.answers] == [answer.tokens for answer in stock.answers]
    else:
        assert ours.answers == stock.answers


@pytest.mark.parametrize(("mode", "name"), CASES)
def test_both_ranks_complete_their_sums_in_a_norm(mode, name):
    stock, ours = sides(mode)[name]
    assert ours.missing == {}
    assert stock.rows == []
    assert len({row["process"] for row in ours.rows if row["calls"]}) == RANKS
    assert in_schedulers(ours) == {key: RANKS * number * FORWARDS for key, number in CALLS[name].items()}
    fused = {row["layer"] for row in ours.rows if row["op"] == "allreduce_add_rmsnorm"}
    assert len(fused) == CALLS[name]["allreduce_add_rmsnorm", ""]
    assert "" not in fused


def test_four_ranks():
    stock, ours = side_by_side([model("llama")], NATIVE, "--tp", "4", "--dtype", "float32")["llama"]
    assert [answer.tokens for answer in ours.answers] == [answer.tokens for answer in stock.answers]
    assert furthest(stock, ours) < 2e-5
    assert in_schedulers(ours) == {key: 4 * number * FORWARDS for key, number in CALLS["llama"].items()}
