"""One SGLang engine for scripts/gpu_sglang.py: it is started with the arguments it is given, then obeys.

Orders come on standard input and answers go to a file descriptor, one JSON a line.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

#: More than an engine takes at once, so that another order makes other batches.
PROMPTS = [
    [(7 * i + 11 * j * j + 3 * i * j) % 250 + 1 for j in range(length)]
    for i, length in enumerate(3 * (7, 3, 35, 64, 18, 50, 5, 90))
]


def generate(started: Any, prompts: list[list[int]], tokens: int, **more: Any) -> list[dict[str, Any]]:
    how = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    found: list[dict[str, Any]] = started.generate(input_ids=prompts, sampling_params=how, **more)
    return found


def answers(started: Any, order: str, tokens: int) -> list[dict[str, Any]]:
    """The answers to PROMPTS, in the order of PROMPTS, asked for in another."""
    order_of = list(range(len(PROMPTS)))
    batches = [order_of[::-1]] if order == "reversed" else [[i] for i in order_of] if order == "alone" else [order_of]
    found: dict[int, dict[str, Any]] = {}
    for batch in batches:
        outputs = generate(started, [PROMPTS[i] for i in batch], tokens, return_logprob=True, logprob_start_len=0)
        for i, output in zip(batch, outputs, strict=True):
            said = output["meta_info"]
            logprobs = [logprob for logprob, *_ in said["output_token_logprobs"]]
            of_prompt = [logprob for logprob, *_ in said["input_token_logprobs"] if logprob is not None]
            found[i] = {"tokens": list(output["output_ids"]), "logprobs": logprobs, "of_prompt": of_prompt}
    return [found[i] for i in order_of]


def timed(started: Any, prompts: list[list[int]], tokens: int) -> float:
    begin = time.perf_counter()
    generate(started, prompts, tokens)
    return time.perf_counter() - begin


def random_prompts(n: int, length: int) -> list[list[int]]:
    return [[(17 * i + 5 * j) % 250 + 1 for j in range(length)] for i in range(n)]


def decode(started: Any, batch: int, steps: int) -> tuple[float, float]:
    """The seconds of a short answer, and of one that is `steps` longer."""
    prompts, few = random_prompts(batch, 32), 8
    return timed(started, prompts, few), timed(started, prompts, few + steps)


def prefill(started: Any, n: int, length: int) -> float:
    """Milliseconds to the first token."""
    return timed(started, random_prompts(n, length), 1) * 1000


DO: dict[str, Callable[..., Any]] = {"answers": answers, "decode": decode, "prefill": prefill}


def main() -> None:
    import sglang

    arguments, out = json.loads(sys.argv[1]), os.fdopen(int(sys.argv[2]), "w", buffering=1)
    say: Callable[..., Any] = partial(print, file=out, flush=True)
    begin = time.perf_counter()
    started = sglang.Engine(**arguments)
    say(json.dumps({"sglang": sglang.__version__, "seconds_to_start": round(time.perf_counter() - begin, 1)}))
    for line in sys.stdin:
        order = json.loads(line)
        say(json.dumps(DO[order.pop("do")](started, **order)))
    started.shutdown()


if __name__ == "__main__":
    main()
