"""Runs the real vLLM on one model after another and writes what it answered: a process of `norm-plugin verify`.

All models run in this process, or with --processes each in an engine with processes of its own, as `vllm serve` has
them; the flags come from the environment.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import inspect
import os
import time
from pathlib import Path
from typing import Any

from norm_plugin import dispatch, settings
from norm_plugin.engines import call_counts
from norm_plugin.verify import child, served
from norm_plugin.verify.outcome import Answer, Outcome

#: What every run has; a variable that is set already stays.
ALWAYS = {
    "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
}  # fmt: skip

#: Arguments of a server that a few short requests do not need: how large it is, and how it is spread over machines.
OF_A_SERVER = (
    "model", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "kv_cache_memory_bytes",
    "gpu_memory_utilization", "enable_prefix_caching", "data_parallel_size", "data_parallel_address",
    "data_parallel_rpc_port", "data_parallel_backend", "api_process_count", "disable_log_stats",
)  # fmt: skip


def from_command(words: list[str]) -> dict[str, Any]:
    """The arguments of vllm.LLM for a `vllm serve`, as vLLM's own parser reads it."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    places = (f"vllm.entrypoints.{package}" for package in ("launchers", "openai"))  # newer, older
    place = next(package for package in places if importlib.util.find_spec(package))
    make_arg_parser = importlib.import_module(f"{place}.cli_args").make_arg_parser
    known = set(inspect.signature(EngineArgs).parameters).difference(OF_A_SERVER)
    return child.from_command(words, make_arg_parser(FlexibleArgumentParser(prog="vllm serve")), known)


def engine_arguments(model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of vllm.LLM: few requests at a time, and nothing that a norm does not need."""
    given: dict[str, Any] = {
        "model": str(model), "dtype": options.dtype, "tensor_parallel_size": options.tp, "seed": 0,
        "enforce_eager": options.mode == "eager", "max_model_len": 256, "max_num_seqs": 8,
        "max_num_batched_tokens": 512, "kv_cache_memory_bytes": 64 << 20, "disable_log_stats": True,
        "skip_tokenizer_init": True, "worker_extension_cls": "norm_plugin.verify.vllm_worker.Worker",
        "enable_prefix_caching": False,  # every request is computed; and with it vLLM 0.32 fails in Mamba2 on a CPU
    }  # fmt: skip
    if options.device == "cuda":
        given |= {"attention_backend": "TRITON_ATTN", "gpu_memory_utilization": 0.3}
    if options.served is not None:
        del given["enforce_eager"]
        given |= from_command(options.served)
    return given | child.others(options)


def answer(prompt: list[int], output: Any) -> Answer:
    """One prompt's answer, from what vLLM says of it."""
    chosen = output.outputs[0]
    logprobs = [position[token].logprob for token, position in zip(chosen.token_ids, chosen.logprobs, strict=True)]
    top = [{str(token): said.logprob for token, said in position.items()} for position in chosen.logprobs]
    return Answer(prompt, list(chosen.token_ids), logprobs, top)


def generate(llm: Any, prompts: list[list[int]], max_tokens: int, **more: Any) -> Any:
    """vLLM's outputs for all prompts in one batch, greedy, with `max_tokens` each."""
    from vllm import SamplingParams

    how = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, **more)
    return llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], how, use_tqdm=False)


def ask(llm: Any, prompts: list[list[int]], max_tokens: int) -> list[Answer]:
    """The answers to all prompts in one batch."""
    outputs = generate(llm, prompts, max_tokens, logprobs=child.TOP)
    return [answer(prompt, output) for prompt, output in zip(prompts, outputs, strict=True)]


def run(model: Path, prompts: list[list[int]], options: argparse.Namespace) -> Outcome:
    """One model in an engine of its own."""
    import vllm
    from vllm.distributed import cleanup_dist_env_and_memory

    begin = time.perf_counter()
    gc.freeze()  # an engine collects garbage nine times: what is imported needs no looking through
    llm = vllm.LLM(**engine_arguments(model, options))
    try:
        llm.collective_rpc("norm_plugin_forget")
        answers = options.use(llm, prompts, options.max_tokens)
        reports = llm.collective_rpc("norm_plugin_report")
        config = llm.llm_engine.vllm_config
        mode = "compiled" if config.compilation_config.mode else "eager"  # what was asked for, as vLLM understood it
        dtype = str(config.model_config.dtype).removeprefix("torch.")
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        call_counts.reset()
        dispatch.reset()  # the next model's layers must not be taken for having run what this one's did
        cleanup_dist_env_and_memory()
        gc.collect()
    return Outcome(
        "vllm", vllm.__version__, model.name, dtype, options.device, mode, settings.given(os.environ), answers,
        rows=[row for report in reports for row in report["rows"]],
        hooks=reports[0]["hooks"], missing=reports[0]["missing"], seconds=time.perf_counter() - begin,
    )  # fmt: skip


def main(use: child.Use = ask) -> None:
    """`use` is what is done with the engine of each model."""
    parser = child.parser("python -m norm_plugin.verify.vllm_child", __doc__, "vllm.LLM")
    parser.add_argument("--processes", action="store_true", help="the engine and its workers in their own processes")
    options = parser.parse_args(namespace=argparse.Namespace(use=use))
    for name, value in ALWAYS.items():
        os.environ.setdefault(name, value)
    if options.served is not None:  # the engine's own parser reads them again
        options.tp = served.number(options.served, "--tensor-parallel-size", "-tp")
        options.processes |= served.number(options.served, "--pipeline-parallel-size", "-pp") > 1
    options.processes |= options.tp > 1
    if not options.processes:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if options.mode == "eager" and options.device == "cpu":  # else a small function of the sampler is compiled
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    if options.tp > 1 and options.device == "cpu":  # else vLLM wants memory of its own for each rank
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    child.run_all(run, options)


if __name__ == "__main__":
    main()
