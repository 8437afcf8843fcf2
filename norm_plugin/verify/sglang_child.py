"""Runs the real SGLang on one model after another and writes what it answered: a process of `norm-plugin verify`.

Each model has an engine of its own, whose scheduler is a process of its own; the flags come from the environment.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from norm_plugin import settings
from norm_plugin.verify.outcome import Answer, Outcome, write

#: What a CPU needs; a flag that is set already stays.
ON_CPU = {"SGLANG_USE_CPU_ENGINE": "1", "TORCHDYNAMO_DISABLE": "1", "SGLANG_MAMBA_CONV_DTYPE": "float32"}

TOP = 5


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m norm_plugin.verify.sglang_child", description=__doc__)
    parser.add_argument("--models", type=Path, nargs="+", required=True, metavar="DIR")
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="JSON: token ids or text of each")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--mode", choices=("eager", "compiled"), default="eager")
    parser.add_argument("--max-tokens", type=int, default=16, metavar="N")
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="tensor parallelism")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=JSON", help="other arguments of sglang.Engine")
    return parser.parse_args()


def engine_arguments(model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What sglang.Engine is given: few requests at a time, and nothing that a norm does not need."""
    given: dict[str, Any] = {
        "model_path": str(model), "dtype": options.dtype, "device": options.device, "tp_size": options.tp,
        "sampling_backend": "pytorch", "grammar_backend": "none", "context_length": 512, "random_seed": 0,
        "max_running_requests": 16, "max_total_tokens": 4096, "disable_radix_cache": True, "skip_server_warmup": True,
        "log_level": "warning",
    }  # fmt: skip
    if options.device == "cpu":
        given |= {"attention_backend": "torch_native", "disable_overlap_schedule": True, "mem_fraction_static": 0.9}
    else:
        given |= {"attention_backend": "triton", "mem_fraction_static": 0.5}
    compiled = options.mode == "compiled"
    given |= {"enable_torch_compile": compiled, "disable_cuda_graph": options.device == "cpu" and not compiled}
    return given | {name: json.loads(value) for name, _, value in (pair.partition("=") for pair in options.set)}


def answer(prompt: list[int], output: dict[str, Any]) -> Answer:
    """One prompt's answer, from what SGLang says of it."""
    said = output["meta_info"]
    best = [{str(token): float(logprob) for logprob, token, _ in position} for position in said["output_top_logprobs"]]
    logprobs = [float(logprob) for logprob, _, _ in said["output_token_logprobs"]]
    return Answer(prompt, list(output["output_ids"]), logprobs, best)


def ask(engine: Any, prompts: list[list[int]], max_tokens: int) -> list[Answer]:
    """All prompts in one batch, greedy, to the last token."""
    how = {"temperature": 0, "max_new_tokens": max_tokens, "ignore_eos": True}
    outputs = engine.generate(input_ids=prompts, sampling_params=how, return_logprob=True, top_logprobs_num=TOP)
    return [answer(prompt, output) for prompt, output in zip(prompts, outputs, strict=True)]


def run(model: Path, prompts: list[list[int]], options: argparse.Namespace) -> Outcome:
    """One model in an engine of its own."""
    import sglang

    begin = time.perf_counter()
    engine = sglang.Engine(**engine_arguments(model, options))
    try:
        answers = ask(engine, prompts, options.max_tokens)
    finally:
        engine.shutdown()
    flags = {flag.name: os.environ[flag.name] for flag in settings.FLAGS if flag.name in os.environ}
    version = importlib.metadata.version("sglang")
    where = (options.dtype, options.device, options.mode)
    seconds = time.perf_counter() - begin
    return Outcome("sglang", version, model.name, *where, flags=flags, answers=answers, seconds=seconds)


def tokens(prompts: list[Any], model: Path) -> list[list[int]]:
    """The prompts as token ids."""
    if all(isinstance(prompt, list) for prompt in prompts):
        return prompts
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return [prompt if isinstance(prompt, list) else tokenizer.encode(prompt) for prompt in prompts]


def main() -> None:
    options = arguments()
    if options.device == "cpu":
        for name, value in ON_CPU.items():
            os.environ.setdefault(name, value)
        if options.tp > 1:  # SGLang asks which cores belong to which rank
            os.environ.setdefault("SGLANG_CPU_OMP_THREADS_BIND", "|".join(str(rank) for rank in range(options.tp)))
    prompts = json.loads(options.prompts.read_text())
    outcomes = []
    for model in options.models:
        outcomes.append(run(model, tokens(prompts, model), options))
        write(outcomes, options.out)
        print(f"{model.name}: {outcomes[-1].seconds:.1f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
