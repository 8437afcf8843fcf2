"""Runs the real SGLang on one model after another and writes what it answered: a process of `norm-plugin verify`.

Each model has an engine of its own, whose scheduler is a process of its own and is killed at the end; what was hooked
and counted there comes from the report that it keeps. The flags come from the environment.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import inspect
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from norm_plugin import settings
from norm_plugin.engines import report_reader
from norm_plugin.verify import child
from norm_plugin.verify.outcome import Answer, Outcome

#: What every run has; a variable that is set already stays.
ALWAYS = {"HF_HUB_OFFLINE": "1"}
ON_CPU = {"SGLANG_USE_CPU_ENGINE": "1", "TORCHDYNAMO_DISABLE": "1", "SGLANG_MAMBA_CONV_DTYPE": "float32"}

#: Arguments of a server that a few short requests do not need: how large it is, and how it is spread over machines.
OF_A_SERVER = (
    "model_path", "tokenizer_path", "context_length", "max_running_requests", "max_total_tokens", "mem_fraction_static",
    "disable_radix_cache", "host", "port", "dp_size", "nnodes", "node_rank", "dist_init_addr", "log_level",
    "skip_server_warmup", "skip_tokenizer_init",
)  # fmt: skip


def from_command(words: list[str]) -> dict[str, Any]:
    """The arguments of sglang.Engine for a serving command, as SGLang's own parser reads it."""
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser(prog="sglang serve")
    ServerArgs.add_cli_args(parser)
    parser.add_argument("--model-type")  # which `sglang serve` takes for itself
    if not words[:1] or not words[0].startswith("-"):  # as it takes a model without an option
        words = ["--model-path", *words]
    known = set(inspect.signature(ServerArgs).parameters).difference(OF_A_SERVER)
    return child.from_command(words, parser, known)


def engine_arguments(model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of sglang.Engine: few requests at a time, and nothing that a norm does not need."""
    given: dict[str, Any] = {
        "model_path": str(model), "dtype": options.dtype, "device": options.device, "tp_size": options.tp,
        "sampling_backend": "pytorch", "grammar_backend": "none", "context_length": 512, "random_seed": 0,
        "max_running_requests": 16, "max_total_tokens": 4096, "disable_radix_cache": True, "skip_server_warmup": True,
        "skip_tokenizer_init": True, "log_level": "warning",
    }  # fmt: skip
    if options.device == "cpu":
        given |= {"attention_backend": "torch_native", "disable_overlap_schedule": True, "mem_fraction_static": 0.9}
    else:
        given |= {"attention_backend": "triton", "mem_fraction_static": 0.3}
    compiled = options.mode == "compiled"
    given |= {"enable_torch_compile": compiled, "disable_cuda_graph": not compiled}
    if options.served is not None:
        given["disable_cuda_graph"] &= options.device == "cpu"  # on a GPU a server has them
        given |= from_command(options.served)
    return given | child.others(options)


def import_only(models: list[Path]) -> None:
    """Let SGLang import only the files of these models: it imports those of all models, in several processes."""
    configs = [json.loads((model / "config.json").read_text()) for model in models]
    architectures = {name for config in configs for name in config["architectures"]}
    package = importlib.util.find_spec("sglang")
    folder = Path((package.submodule_search_locations or [""])[0] if package else "") / "srt" / "models"
    others = []
    for file in sorted(folder.glob("*.py")):
        text = file.read_text(encoding="utf-8")
        if not any(f"class {architecture}(" in text for architecture in architectures):
            others.append(file.stem)
    os.environ.setdefault("SGLANG_DISABLED_MODEL_ARCHS", ",".join(others))


def share_imports() -> None:
    """Start SGLang's processes on a CPU as copies of one that has imported SGLang, and no plugin.

    SGLang itself starts new interpreters, whose imports take most of the time of a small run.
    """
    from sglang.srt.entrypoints import engine

    multiprocessing.set_start_method("forkserver", force=True)
    multiprocessing.set_forkserver_preload(["sglang.srt.managers.scheduler", "sglang.srt.managers.detokenizer_manager"])
    multiprocessing.set_start_method = lambda method, force=False: None  # SGLang asks for spawn
    kill = engine.kill_process_tree

    def kill_but_the_first(parent: int | None, *args: Any, **named: Any) -> None:
        """An engine that ends kills all processes below this one. The next engine needs the one that is copied."""
        kill(parent, *args, **named | {"skip_pid": vars(forkserver._forkserver)["_forkserver_pid"]})

    engine.kill_process_tree = kill_but_the_first


def answer(prompt: list[int], output: dict[str, Any]) -> Answer:
    """One prompt's answer, from what SGLang says of it."""
    said = output["meta_info"]
    best = [{str(token): float(logprob) for logprob, token, _ in position} for position in said["output_top_logprobs"]]
    logprobs = [float(logprob) for logprob, _, _ in said["output_token_logprobs"]]
    return Answer(prompt, list(output["output_ids"]), logprobs, best)


def generate(engine: Any, prompts: list[list[int]], max_tokens: int, **more: Any) -> Any:
    """SGLang's outputs for all prompts in one batch, greedy, with `max_tokens` each."""
    how = {"temperature": 0, "max_new_tokens": max_tokens, "ignore_eos": True}
    return engine.generate(input_ids=prompts, sampling_params=how, **more)


def ask(engine: Any, prompts: list[list[int]], max_tokens: int) -> list[Answer]:
    """The answers to all prompts in one batch."""
    outputs = generate(engine, prompts, max_tokens, return_logprob=True, top_logprobs_num=child.TOP)
    return [answer(prompt, output) for prompt, output in zip(prompts, outputs, strict=True)]


def run(model: Path, prompts: list[list[int]], options: argparse.Namespace) -> Outcome:
    """One model in an engine of its own."""
    import sglang

    begin = time.perf_counter()
    earlier = [process["pid"] for process in report_reader.read(options.report)]
    engine = sglang.Engine(**engine_arguments(model, options))
    try:
        answers = options.use(engine, prompts, options.max_tokens)
    finally:
        engine.shutdown()
    processes = [process for process in report_reader.read(options.report) if process["pid"] not in earlier]
    hooked = [engine for process in processes for engine in process["engines"] if process["rows"]]
    return Outcome(
        "sglang", importlib.metadata.version("sglang"), model.name, options.dtype, options.device, options.mode,
        options.flags, answers,
        rows=[row | {"process": process["command"]} for process in processes for row in process["rows"]],
        hooks=hooked[0]["hooks"] if hooked else {}, missing=hooked[0]["missing"] if hooked else {},
        seconds=time.perf_counter() - begin,
    )  # fmt: skip


def main(use: child.Use = ask) -> None:
    """`use` is what is done with the engine of each model."""
    parser = child.parser("python -m norm_plugin.verify.sglang_child", __doc__, "sglang.Engine")
    options = parser.parse_args(namespace=argparse.Namespace(use=use))
    options.flags = settings.given(os.environ)  # as they were before this process asks for a report of its own
    options.report = Path(os.environ.get("NORM_PLUGIN_REPORT") or tempfile.mkdtemp(prefix="norm_plugin.sglang."))
    cores = "|".join(str(rank) for rank in range(options.tp))  # SGLang asks which belong to which rank
    wanted = ALWAYS | {"NORM_PLUGIN_REPORT": str(options.report)} | (ON_CPU if options.device == "cpu" else {})
    wanted |= {"SGLANG_CPU_OMP_THREADS_BIND": cores} if options.device == "cpu" and options.tp > 1 else {}
    for name, value in wanted.items():
        os.environ.setdefault(name, value)
    import_only(options.models)
    try:
        if options.device == "cpu":
            share_imports()
        child.run_all(run, options)
    finally:
        if "NORM_PLUGIN_REPORT" not in options.flags:
            shutil.rmtree(options.report)


if __name__ == "__main__":
    main()
