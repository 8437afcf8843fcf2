"""The real SGLang on tiny models: stock against patched, with the calls counted in the scheduler's process."""

import functools

import pytest

from tests.engines.sglang_runs import NATIVE, TOKENS, furthest, in_schedulers, model, side_by_side

FORWARDS = TOKENS  # one of all prompts, and one for each further token

#: Who normalizes in a forward: op and reason, and how often.
CALLS = {
    "llama": {("rmsnorm", ""): 1, ("add_rmsnorm", ""): 6},
    "qwen3": {("rmsnorm", ""): 1 + 6, ("add_rmsnorm", ""): 6},
    "gemma3": {("rmsnorm", ""): 1 + 6 + 6, ("add_rmsnorm", ""): 6},
    "gpt2": {("layernorm", "torch.nn.LayerNorm"): 7},
    "nemotron_h": {("rmsnorm", ""): 1, ("add_rmsnorm", ""): 5, ("gated_norm", ""): 2},
    "falcon_h1": {("rmsnorm", ""): 1, ("add_rmsnorm", ""): 4, ("gated_norm", ""): 2},
}


#: A model whose stock gated norm is a Triton kernel, run by an interpreter that sums in another order than PyTorch.
INTERPRETED = {"qwen3_next": {("rmsnorm", ""): 3, ("add_rmsnorm", ""): 8, ("gated_norm", ""): 3}}

#: Ten times the eps of tiny:llama.
WRONG = model("llama", rms_norm_eps=1e-4)


@functools.cache
def sides():
    """Stock and patched, at the same time; llama with a wrong eps too."""
    models = [model(name) for name in (*CALLS, *INTERPRETED)]
    return side_by_side([*models, WRONG], NATIVE)


def answers_of(name, *flags):
    """What one side answered."""
    return sides()[name][1 if flags else 0].answers


@pytest.mark.parametrize("name", CALLS)
def test_the_same_bits(name):
    stock, ours = sides()[name]
    assert len(ours.answers[0].tokens) == TOKENS
    assert ours.answers == stock.answers


@pytest.mark.parametrize("name", [*CALLS, *INTERPRETED])
def test_who_normalized(name):
    stock, ours = sides()[name]
    expected = (CALLS | INTERPRETED)[name]
    assert in_schedulers(ours) == {key: number * FORWARDS for key, number in expected.items()}
    assert stock.rows == []
    assert stock.hooks == {}
    assert ours.missing == {}
    assert all(row["layer"] for row in ours.rows if row["calls"])


@pytest.mark.parametrize("name", INTERPRETED)
def test_the_same_tokens_beside_an_interpreted_kernel(name):
    """Both round each gated value once from fp32, so a value in a thousand is the next bf16 number."""
    stock, ours = sides()[name]
    assert [answer.tokens for answer in ours.answers] == [answer.tokens for answer in stock.answers]
    assert furthest(stock, ours) < wrong_by() / 2


def wrong_by():
    """How far an eps ten times as large is from the right one, in logprobs, in the same engine."""
    return furthest(sides()["llama"][0], sides()[WRONG.name][0])


def test_a_wrong_eps_keeps_the_tokens_and_is_caught():
    right, wrong = answers_of("llama"), sides()[WRONG.name][1].answers
    assert [answer.tokens for answer in wrong] == [answer.tokens for answer in right]
    assert wrong != right
