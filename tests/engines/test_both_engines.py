"""One model, served by vLLM and by SGLang with the plugin on."""

import pytest

from tests.engines.runs import NATIVE, Run, calls, furthest, model

#: In fp32 the engines differ by the order of their sums; an eps ten times as large moves a logprob by more than this.
FLOOR = 1e-4


@pytest.fixture(scope="module")
def answered():
    models = [model("llama"), model("qwen3")]
    both = [Run(engine, models, NATIVE, "--dtype", "float32") for engine in ("vllm", "sglang")]
    return {vllm.model: (vllm, sglang) for vllm, sglang in zip(*(run.outcomes() for run in both), strict=True)}


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_the_same_greedy_tokens(answered, name):
    vllm, sglang = answered[name]
    assert (vllm.engine, sglang.engine) == ("vllm", "sglang")
    assert [answer.tokens for answer in vllm.answers] == [answer.tokens for answer in sglang.answers]
    assert furthest(vllm, sglang) < FLOOR
    for outcome in (vllm, sglang):
        assert {reason for _, reason in calls(outcome)} == {""}
