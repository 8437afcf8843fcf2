"""Starts engines, each in a process of its own, and tells them what to do."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from norm_plugin.verify import failure, outcome, runs
from norm_plugin.verify.outcome import Answer, Outcome

ROOT = Path(__file__).resolve().parent.parent

#: How an engine may be run. SGLang's default mode has CUDA graphs, and so has vLLM's, which compiles too.
MODES = {"vllm": ("eager", "compiled"), "sglang": ("default", "deterministic")}
ORDERS = ("given", "reversed", "alone")

Prompts = list[list[int]]


def arguments(engine: str, mode: str, requests: int, at_once: int, cuda: bool, port: int) -> dict[str, Any]:
    """What an engine is given beyond what verify gives it: `requests` and `at_once` tokens at a time."""
    batches = [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= requests]
    if engine == "vllm":
        given: dict[str, Any] = {"max_num_seqs": requests, "max_num_batched_tokens": at_once}
        graphs = {"cudagraph_capture_sizes": batches}
        on_gpu = {"gpu_memory_utilization": 0.15, "kv_cache_memory_bytes": 3 << 30, "compilation_config": graphs}
    else:
        given = {"max_running_requests": requests, "port": port, "nccl_port": port + 1}
        given["enable_deterministic_inference"] = mode == "deterministic" and cuda  # no kernel of it runs on a CPU
        on_gpu = {
            "disable_cuda_graph": False, "cuda_graph_bs_decode": batches, "disable_prefill_cuda_graph": True,
            "mem_fraction_static": 0.5, "max_total_tokens": 32768,
            "max_mamba_cache_size": 4 * requests,  # else it takes all the memory there is, and others start too
        }  # fmt: skip
    return given | (on_gpu if cuda else {})


def plugin_folder(work: Path) -> Path:
    """Makes the metadata by which engines find plugins; a checkout has none."""
    metadata = work / "plugin" / "norm_plugin-0.dist-info"
    metadata.mkdir(parents=True, exist_ok=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: norm-plugin\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nnorm_plugin = norm_plugin.engines.vllm:register\n"
        "[sglang.srt.plugins]\nnorm_plugin = norm_plugin.engines.sglang:register\n"
    )
    return metadata.parent


class Engine:
    """A process that starts at once, in the background, obeys the orders in `first`, and is killed after `seconds`."""

    def __init__(
        self,
        kind: str,
        model: Path,
        folder: Path,
        flags: dict[str, str],
        words: Sequence[str],
        seconds: float,
        first: Sequence[str] = (),
    ) -> None:
        folder.mkdir()
        self.kind, self.log, self.out = kind, folder / "log", folder / "outcome.json"
        (folder / "prompts.json").write_text("[]")
        paths = [str(plugin_folder(folder)), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        env = {"OMP_NUM_THREADS": "4", **runs.environment(flags), "PYTHONPATH": os.pathsep.join(paths)}
        command = [sys.executable, "-m", "benchmarks.engine_child", kind, "--models", str(model)]
        command += ["--prompts", str(folder / "prompts.json"), "--out", str(self.out), *words]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, env=env | {"SGLANG_PLUGINS": "norm_plugin", "TMPDIR": str(folder)}, cwd=ROOT, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, start_new_session=True,
            )  # fmt: skip
        self.starting, self.first = True, first
        self.watch = threading.Timer(seconds, self.kill)
        self.watch.daemon = True
        self.watch.start()

    def kill(self) -> None:
        """End it, and every process that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def failed(self) -> RuntimeError:
        """The error to raise when it has ended, with the reason that its log gives."""
        why = failure.reason(self.log.read_text(errors="replace"))
        return RuntimeError(f"{self.kind} ended with {self.process.wait()}: {why}")

    def said(self) -> Any:
        """Its next line."""
        assert self.process.stdout is not None
        if not (line := self.process.stdout.readline()):
            raise self.failed()
        return json.loads(line)

    def ready(self) -> None:
        """Wait until it has started."""
        if self.starting:
            self.said()
            self.starting = False
            for order in self.first:
                self.ask(order)

    def ask(self, do: str, **order: Any) -> Any:
        """Give an order, and return its answer."""
        self.ready()
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, and its log says why
            self.process.stdin.write(json.dumps({"do": do, **order}) + "\n")
            self.process.stdin.flush()
        return self.said()

    def answers(self, prompts: Prompts, max_tokens: int, order: str = "given") -> list[Answer]:
        """The answers to the prompts in their order, asked for in this one."""
        batches = {"given": [prompts], "reversed": [prompts[::-1]], "alone": [[prompt] for prompt in prompts]}[order]
        found = [
            Answer(**answer)
            for batch in batches
            for answer in self.ask("answers", prompts=batch, max_tokens=max_tokens)
        ]
        return found[::-1] if order == "reversed" else found

    def seconds(self, prompts: Prompts, max_tokens: int) -> float:
        """How long all answers together take."""
        taken: float = self.ask("seconds", prompts=prompts, max_tokens=max_tokens)
        return taken

    def end(self) -> Outcome:
        """Stop it; its version, and whose norms ran."""
        self.ready()
        self.process.communicate()
        if self.process.returncode != 0:
            raise self.failed()
        return outcome.read(self.out)[0]

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.watch.cancel()
        self.kill()
        self.process.communicate()


def calls(found: Outcome) -> dict[str, int]:
    """How often each op of ours ran, and how often the engine did its work, by reason."""
    counts: Counter[str] = Counter()
    for row in found.rows:
        counts[f"{row['op']}: not ours, {row['reason']}" if row["reason"] else row["op"]] += row["calls"]
    return {name: number for name, number in sorted(counts.items()) if number}


def prompts(count: int, length: int) -> Prompts:
    """Always the same, of tokens that every model has."""
    return [[(17 * i + 5 * j) % 250 + 1 for j in range(length)] for i in range(count)]


#: More than an engine takes at once, so that another order makes other batches.
UNEQUAL = [
    [(7 * i + 11 * j * j + 3 * i * j) % 250 + 1 for j in range(length)]
    for i, length in enumerate(3 * (7, 3, 35, 64, 18, 50, 5, 90))
]
