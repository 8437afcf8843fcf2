"""One SGLang engine of scripts/gpu_sglang.py, in a process of its own: asks it what a task says, writes what comes.

python3 scripts/gpu_sglang_engine.py TASK ANSWER
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

PROMPTS = [
    [(7 * i + 11 * j) % 250 + 1 for j in range(length)] for i, length in enumerate((7, 3, 35, 64, 18, 50, 5, 90))
]


def engine(task: dict[str, Any]) -> dict[str, Any]:
    """What one engine answers and how long it takes."""
    import sglang

    begin = time.perf_counter()
    started = sglang.Engine(**task["arguments"])
    found: dict[str, Any] = {"version": sglang.__version__, "seconds_to_start": time.perf_counter() - begin}
    try:
        found["answers"] = {order: answers(started, order, task["tokens"]) for order in task.get("orders", [])}
        found["decode"] = {str(batch): decode(started, batch, task["steps"]) for batch in task.get("batches", [])}
        found["prefill"] = {f"{n}x{length}": prefill(started, n, length) for n, length in task.get("prefills", [])}
    finally:
        started.shutdown()
    return found


def generate(started: Any, prompts: list[list[int]], tokens: int, **more: Any) -> list[dict[str, Any]]:
    how = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    return started.generate(input_ids=prompts, sampling_params=how, **more)


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


def decode(started: Any, batch: int, steps: int) -> float:
    """Tokens a second while decoding: the time of a long answer less that of a short one, the median of three."""
    prompts, few = random_prompts(batch, 32), 8
    timed(started, prompts, few)
    found = []
    for _ in range(3):
        short, long = timed(started, prompts, few), timed(started, prompts, few + steps)
        found.append(batch * steps / (long - short))
    return statistics.median(found)


def prefill(started: Any, n: int, length: int) -> float:
    """Milliseconds to the first token, the median of seven."""
    prompts = random_prompts(n, length)
    timed(started, prompts, 1)
    return statistics.median(timed(started, prompts, 1) for _ in range(7)) * 1000


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(engine(json.loads(Path(sys.argv[1]).read_text()))))
