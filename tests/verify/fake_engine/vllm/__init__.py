"""TESTS ONLY. As much of vLLM as verify asks for: it repeats tokens, fails or waits, as $FAKE_VLLM says."""

import os
import time
from types import SimpleNamespace

__version__ = "0.0.fake"


class SamplingParams:
    def __init__(self, **how):
        self.tokens = how["max_tokens"]


class LLM:
    def __init__(self, **named):
        if os.environ.get("FAKE_VLLM") == "fails":
            try:
                raise KeyError("sliding_window" + " and more" * 40)
            except KeyError as error:
                raise ValueError("the config lacks a field") from error
        if os.environ.get("FAKE_VLLM") == "waits":
            print("waiting", flush=True)
            time.sleep(600)
        config = SimpleNamespace(
            compilation_config=SimpleNamespace(mode=0), model_config=SimpleNamespace(dtype="torch.bfloat16")
        )
        core = SimpleNamespace(shutdown=lambda: None)
        self.llm_engine = SimpleNamespace(vllm_config=config, engine_core=core)

    def collective_rpc(self, name):
        return [{"hooks": {}, "missing": {}, "rows": []}]

    def generate(self, prompts, how, use_tqdm):
        position = {7: SimpleNamespace(logprob=-0.5), 8: SimpleNamespace(logprob=-1.5)}
        one = SimpleNamespace(token_ids=[7] * how.tokens, logprobs=[position] * how.tokens)
        return [SimpleNamespace(outputs=[one]) for _ in prompts]
