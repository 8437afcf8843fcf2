#!/usr/bin/env python3
"""The real SGLang on a GPU, stock against patched: the same output, and how fast.

    PYTHONPATH=<SGLang and what it needs>:. python3 scripts/gpu_sglang.py PART [--out DIR] [--seconds 540] ...

PART is one of
  equal          tiny models of each family, default mode with CUDA graphs: tokens and logprobs of stock and patched,
                 beside the noise floor, which is stock against stock with the requests in another order and one by one
  deterministic  the same under --enable-deterministic-inference, for the dense families: bits across batch orders,
                 batch sizes, repeats and processes
  speed          a dense model of 28 layers (--shape 0.6b, 1.7b or 7b), default mode: decode throughput at batch 1 to 64
                 and prefill; --repeats engines of each side, taking turns
  speed_deterministic   the same in deterministic mode
  speed_gemma3   the same in default mode for Gemma 3, whose q and k norms SGLang has no kernel for
  kernel         SGLang's fused_norm_gate against ours at decode sizes, in replayed CUDA graphs

Each writes DIR/sglang_PART.json as it goes, prints a line a run, and starts nothing that cannot end within --seconds.
Nothing has to be installed: the entry point is made in a folder of its own. Nothing else may run on the GPU meanwhile.
`--device cpu` is a rehearsal with tiny sizes that says nothing about speed; it needs the stand-ins of the tests.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

FAMILIES = ("llama", "qwen3", "gemma3", "gpt2", "qwen3_next", "qwen3_5", "nemotron_h", "falcon_h1", "mamba2")
DENSE = ("llama", "qwen3", "gemma3")
ENGINE = ROOT / "scripts" / "gpu_sglang_engine.py"
ENGINE_SECONDS = 240  # most of an engine
QWEN3 = {"0.6b": (1024, 3072, 16, 8), "1.7b": (2048, 6144, 16, 8), "7b": (3584, 18944, 28, 4), "tiny": (64, 128, 2, 1)}


# --- running them -------------------------------------------------------------------------------------------------


class Runs:
    """Starts engines, keeps the clock, and writes what came out after each."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.begin = time.monotonic()
        self.work = Path(tempfile.mkdtemp(prefix="gpu_sglang."))
        self.cpu = options.device == "cpu"
        self.tokens = 4 if self.cpu else 24
        self.found: dict[str, Any] = {"part": options.part, **about(), "runs": []}
        metadata = self.work / "plugin" / "norm_plugin-0.dist-info"
        metadata.mkdir(parents=True)
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: norm-plugin\nVersion: 0\n")
        (metadata / "entry_points.txt").write_text(
            "[sglang.srt.plugins]\nnorm_plugin = norm_plugin.engines.sglang:register\n"
        )

    def left(self) -> float:
        """Seconds."""
        return self.options.seconds - (time.monotonic() - self.begin)

    def out_of_time(self, engines: int) -> bool:
        """Whether that many engines would not end in time, if they take what the slowest has taken."""
        return self.left() < engines * max([40.0, *(run["seconds"] for run in self.found["runs"])])

    def save(self) -> None:
        self.options.out.mkdir(parents=True, exist_ok=True)
        place = self.options.out / f"sglang_{self.options.part}.json"
        place.write_text(json.dumps(self.found, indent=1) + "\n")

    def arguments(self, model: Path, *, deterministic: bool, batches: list[int]) -> dict[str, Any]:
        given: dict[str, Any] = {
            "model_path": str(model), "dtype": "bfloat16", "device": self.options.device, "random_seed": 0,
            "sampling_backend": "pytorch", "grammar_backend": "none", "skip_tokenizer_init": True,
            "skip_server_warmup": True, "disable_radix_cache": True, "log_level": "warning",
            "max_running_requests": max(batches), "mem_fraction_static": 0.5,
            "max_total_tokens": 32768, "enable_deterministic_inference": deterministic,
        }  # fmt: skip
        if self.cpu:
            more = {"disable_overlap_schedule": True, "disable_cuda_graph": True, "max_total_tokens": 4096}
            return given | more | {"attention_backend": "torch_native", "mem_fraction_static": 0.9}
        graphs = {"cuda_graph_bs_decode": batches, "disable_prefill_cuda_graph": not self.options.prefill_graphs}
        return given | {"attention_backend": "triton"} | graphs

    def run(self, label: str, task: dict[str, Any], *, patched: bool) -> dict[str, Any] | None:
        """One engine; None where it failed, which is written down with its last lines."""
        from norm_plugin.verify.sglang_child import import_only

        side = "patched" if patched else "stock"
        place = Path(tempfile.mkdtemp(prefix=f"{label}-{side}.", dir=self.work))
        (place / "task").write_text(json.dumps(task))
        env = {k: v for k, v in os.environ.items() if not k.startswith(("NORM_PLUGIN", "USE_NATIVE"))}
        paths = [str(self.work / "plugin"), str(ROOT), os.environ.get("PYTHONPATH", "")]
        env |= {"PYTHONPATH": ":".join(filter(None, paths)), "HF_HUB_OFFLINE": "1", "SGLANG_PLUGINS": "norm_plugin"}
        if patched:
            env |= {"NORM_PLUGIN": "native" if self.cpu else "auto", "NORM_PLUGIN_REPORT": str(place / "report")}
        import_only([Path(task["arguments"]["model_path"])])
        env["SGLANG_DISABLED_MODEL_ARCHS"] = os.environ.pop("SGLANG_DISABLED_MODEL_ARCHS")
        if self.cpu:
            env |= {"SGLANG_USE_CPU_ENGINE": "1", "TORCHDYNAMO_DISABLE": "1", "TRITON_INTERPRET": "1"}
        begin = time.monotonic()
        with (place / "log").open("w") as log:
            command = [sys.executable, str(ENGINE), str(place / "task"), str(place / "answer")]
            process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(min(ENGINE_SECONDS, max(self.left(), 1)))
            with contextlib.suppress(ProcessLookupError):  # what is left of it and of the processes that it started
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        entry: dict[str, Any] = {"label": label, "side": side, "seconds": round(time.monotonic() - begin, 1)}
        self.found["runs"].append(entry)
        if not (place / "answer").exists():
            entry["failed"] = (place / "log").read_text().splitlines()[-25:]
            print(f"{label} {side}: FAILED after {entry['seconds']} s: {' | '.join(entry['failed'][-3:])}", flush=True)
            self.save()
            return None
        found: dict[str, Any] = json.loads((place / "answer").read_text())
        entry |= {key: found[key] for key in ("version", "seconds_to_start", "decode", "prefill") if found[key]}
        if patched:
            entry["calls"] = calls(place / "report")
        print(f"{label} {side}: {entry['seconds']} s {entry.get('decode', '')} {entry.get('prefill', '')}", flush=True)
        self.save()
        return found


def calls(folder: Path) -> dict[str, int]:
    """Who normalized in the scheduler, by op and the reason where it was not we."""
    from norm_plugin.engines import report_file

    found: Counter[str] = Counter()
    for process in report_file.read(folder) if folder.is_dir() else []:
        for row in process["rows"]:
            backends = "/".join(sorted({entry["backend"] for entry in row["implementations"]}))
            if row["calls"]:
                found[f"{row['op']}: {'not ours, ' + row['reason'] if row['reason'] else backends or 'ours'}"] += row[
                    "calls"
                ]
    return dict(sorted(found.items()))


def about() -> dict[str, Any]:
    """When, where, and with what."""
    import torch
    import triton

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU"
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {
        "date": now,
        "gpu": gpu,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": sys.version[:6],
    }


# --- the parts ----------------------------------------------------------------------------------------------------


def difference(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> dict[str, Any]:
    """Of two sets of answers: logprobs are compared up to and with the first other token."""
    largest, same, first = 0.0, 0, []
    for a, b in zip(one, other, strict=True):
        until = next(
            (i for i, (s, t) in enumerate(zip(a["tokens"], b["tokens"], strict=True)) if s != t), len(a["tokens"])
        )
        same += until == len(a["tokens"])
        first.append(until)
        of_prompt = zip(a["of_prompt"], b["of_prompt"], strict=True)
        pairs = [*of_prompt, *list(zip(a["logprobs"], b["logprobs"], strict=True))[: until + 1]]
        largest = max([largest, *(abs(x - y) for x, y in pairs)])
    return {"bitwise": one == other, "same_tokens": f"{same}/{len(one)}", "max_dlogprob": largest, "first_other": first}


def pair(runs: Runs, name: str, task: dict[str, Any]) -> tuple[Any, Any]:
    stock = runs.run(name, task, patched=False)
    return stock, runs.run(name, task, patched=True)


def equal(runs: Runs, options: argparse.Namespace) -> None:
    for name in options.families or FAMILIES:
        if runs.out_of_time(2):
            print(f"{name}: no time left", flush=True)
            break
        arguments = runs.arguments(tiny_model(name, runs.work), deterministic=False, batches=[1, 2, 4, 8])
        stock, ours = pair(
            runs, name, {"arguments": arguments, "orders": ["given", "reversed", "alone"], "tokens": runs.tokens}
        )
        if not stock or not ours:
            continue
        s, o = stock["answers"], ours["answers"]
        floor = {order: difference(s["given"], s[order]) for order in ("reversed", "alone")}
        patched = {order: difference(s[order], o[order]) for order in s}
        limit = max(found["max_dlogprob"] for found in floor.values())
        inside = max(found["max_dlogprob"] for found in patched.values()) <= limit
        tell(runs, {"model": name, "floor": floor, "patched": patched, "inside_the_floor": inside})


def deterministic(runs: Runs, options: argparse.Namespace) -> None:
    orders = ["given", "again", "reversed", "alone"]
    for name in options.families or DENSE:
        if runs.out_of_time(3):
            print(f"{name}: no time left", flush=True)
            break
        arguments = runs.arguments(tiny_model(name, runs.work), deterministic=True, batches=[1, 2, 4, 8])
        task = {"arguments": arguments, "orders": orders, "tokens": runs.tokens}
        stock, ours = pair(runs, name, task)
        again = runs.run(name, task | {"orders": ["given"]}, patched=True)
        if not ours or not again:
            continue
        o = ours["answers"]
        own = {order: o["given"] == o[order] for order in orders[1:]}
        own["another process"] = o["given"] == again["answers"]["given"]
        found: dict[str, Any] = {"model": name, "patched_bitwise": own, "all_bitwise": all(own.values())}
        if stock:
            s = stock["answers"]
            found["stock_bitwise"] = {order: s["given"] == s[order] for order in orders[1:]}
            found["patched_and_stock"] = difference(s["given"], o["given"])
        tell(runs, found)


def speed(runs: Runs, options: argparse.Namespace) -> None:
    mode = options.part == "speed_deterministic"
    model = gemma3_model(runs) if options.part == "speed_gemma3" else qwen3_model(runs, options.shape)
    batches = [1, 2] if runs.cpu else [1, 8, 16, 32, 64]
    arguments = runs.arguments(model, deterministic=mode, batches=batches) | {"load_format": "dummy"}
    prefills = [(1, 32)] if runs.cpu else [(1, 32), (1, 512), (8, 1024)]
    steps = 8 if runs.cpu else 128
    task = {"arguments": arguments, "batches": batches, "prefills": prefills, "steps": steps, "tokens": 0}
    sides: dict[str, list[dict[str, Any]]] = {"stock": [], "patched": []}
    for repeat in range(options.repeats):
        if runs.out_of_time(2):
            break
        for side in ("stock", "patched") if repeat % 2 == 0 else ("patched", "stock"):  # neither is always the first
            found = runs.run(model.name, task, patched=side == "patched")
            if found:
                sides[side].append(found)
        if not all(sides.values()):
            continue
        medians = {s: {k: {n: middle(f[k][n] for f in found) for n in found[0][k]} for k in ("decode", "prefill")}
                   for s, found in sides.items()}  # fmt: skip
        stock, ours = medians["stock"], medians["patched"]
        gain = {"decode": {n: ours["decode"][n] / stock["decode"][n] for n in stock["decode"]},
                "prefill": {n: stock["prefill"][n] / ours["prefill"][n] for n in stock["prefill"]}}  # fmt: skip
        runs.found["medians"], runs.found["repeats"] = medians, min(map(len, sides.values()))
        runs.found["patched_over_stock"] = gain
        runs.save()
    print(json.dumps(runs.found.get("patched_over_stock"), indent=1), flush=True)


def kernel(runs: Runs, options: argparse.Namespace) -> None:
    """rows are tokens x 32 heads of 128, as in Qwen3-Next; every call has buffers of its own in turn."""
    import torch
    from sglang.kernels.ops.attention.fla.fused_norm_gate import layer_norm_gated_fwd

    from norm_plugin import rmsnorm_fn
    from norm_plugin.bench.timing import graph_time

    device, width = options.device, 128
    runs.found["rows"] = []
    for activation in ("silu", "sigmoid"):
        for tokens in (1, 2) if runs.cpu else (1, 2, 4, 8, 16, 32, 64, 128, 512):
            rows = tokens * 32
            w = torch.randn(width, device=device, dtype=torch.bfloat16)
            sets = [torch.randn(2, rows, width, device=device, dtype=torch.bfloat16) for _ in range(8)]
            theirs = [partial(layer_norm_gated_fwd, x, z, w, None, activation, 1e-6, is_rms_norm=True) for x, z in sets]
            ours = [partial(rmsnorm_fn, x, w, None, z, 1e-6, activation=activation) for x, z in sets]
            expected, got = ours[0](), theirs[0]()[0]  # theirs writes into x, which ours has read by now
            ulps = (expected.view(torch.int16).int() - got.view(torch.int16).int()).abs().max().item()
            row: dict[str, Any] = {"tokens": tokens, "activation": activation, "largest_difference_in_ulps": ulps}
            if not runs.cpu:
                times = [(graph_time(theirs).median, graph_time(ours).median) for _ in range(options.repeats)]
                row |= {"sglang_us": middle(t for t, _ in times), "ours_us": middle(t for _, t in times)}
                row["ratio"] = row["sglang_us"] / row["ours_us"]
            tell(runs, row, "rows")


def middle(values: Iterator[float]) -> float:
    return statistics.median(values)


def tell(runs: Runs, found: dict[str, Any], where: str = "models") -> None:
    runs.found.setdefault(where, []).append(found)
    runs.save()
    print(json.dumps(found), flush=True)


# --- models -------------------------------------------------------------------------------------------------------


def tiny_model(name: str, work: Path) -> Path:
    from norm_plugin.verify import tiny

    return tiny.make(name, work / "models")


def config_only(runs: Runs, name: str, config: dict[str, Any]) -> Path:
    """A model without weights: SGLang makes random ones, the same every time."""
    folder = runs.work / "models" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def qwen3_model(runs: Runs, shape: str) -> Path:
    from norm_plugin.verify.architectures import ARCHITECTURES

    hidden, inner, heads, kv_heads = QWEN3["tiny" if runs.cpu else shape]
    config = ARCHITECTURES["qwen3"].config | {
        "hidden_size": hidden, "intermediate_size": inner,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "head_dim": 32 if runs.cpu else 128, "num_hidden_layers": 2 if runs.cpu else 28, "vocab_size": 32000,
        "max_position_embeddings": 4096, "rope_theta": 1e6,
    }  # fmt: skip
    return config_only(runs, f"qwen3-{shape}", config)


def gemma3_model(runs: Runs) -> Path:
    from norm_plugin.verify.architectures import ARCHITECTURES

    layers = 2 if runs.cpu else 26
    config = ARCHITECTURES["gemma3"].config | {
        "num_hidden_layers": layers, "vocab_size": 32000, "max_position_embeddings": 4096, "sliding_window": 512,
        "layer_types": ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(layers)],
    }  # fmt: skip
    if not runs.cpu:  # Gemma 3 1B
        config |= {"hidden_size": 1152, "intermediate_size": 6912, "num_attention_heads": 4, "num_key_value_heads": 1,
                   "head_dim": 256, "query_pre_attn_scalar": 256}  # fmt: skip
    return config_only(runs, "gemma3-1b", config)


PARTS = {
    "equal": equal, "deterministic": deterministic, "speed": speed, "speed_deterministic": speed,
    "speed_gemma3": speed, "kernel": kernel,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")), metavar="DIR")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--families", nargs="+", choices=FAMILIES, metavar="NAME", help="equal, deterministic: only these"
    )
    parser.add_argument("--shape", choices=[name for name in QWEN3 if name != "tiny"], default="0.6b", help="speed")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="speed, kernel")
    parser.add_argument("--prefill-graphs", action="store_true", help="SGLang's CUDA graphs of prefill as well")
    parser.add_argument(
        "--seconds", type=float, default=540, metavar="S", help="start nothing that would not end by then"
    )
    options = parser.parse_args()
    runs = Runs(options)
    PARTS[options.part](runs, options)
    runs.save()
    print(f"written: {options.out / f'sglang_{options.part}.json'}, {time.monotonic() - runs.begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
