#!/usr/bin/env python3
"""The real SGLang on a GPU, stock against patched: the same output, and how fast.

    PYTHONPATH=<SGLang and what it needs>:. python3 scripts/gpu_sglang.py PART [--out DIR] [--seconds 540] ...

PART is one of
  equal          each family, default mode with CUDA graphs: tokens and logprobs of stock and patched, beside the noise
                 floor, which is stock against stock with the requests in another order and one by one
  deterministic  the same under --enable-deterministic-inference: bits across batch orders, batch sizes, repeats and
                 processes
  speed          a dense model of 28 layers (--shape 0.6b, 1.7b or 7b), default mode: decode throughput at batch 1 to 64
                 and prefill; both engines are there at once and take turns; the median of --repeats 3, each the
                 fastest of --shots 4: what else a host does only ever makes one slower
  speed_deterministic   the same in deterministic mode
  speed_gemma3   the same in default mode for Gemma 3, whose q and k norms SGLang has no kernel for
  kernel         SGLang's fused_norm_gate against ours at decode sizes, in replayed CUDA graphs

Each writes DIR/sglang_PART.json as it goes, prints a line a run, and starts nothing that cannot end within --seconds.
Nothing has to be installed: the entry point is made in a folder of its own. Nothing else may run on the GPU meanwhile.
`--device cpu` is a rehearsal with tiny sizes that says nothing about speed; it needs the stand-ins of the tests.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import datetime, timezone
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from gpu_child import Child, fastest
from gpu_sglang_models import gemma3, qwen3

from norm_plugin.tiny_models import checkpoint
from norm_plugin.verify.comparison import MAX_MARGIN, MEAN_MARGIN

FAMILIES = ("llama", "qwen3", "gemma3", "gpt2", "qwen3_next", "qwen3_5", "nemotron_h", "falcon_h1")
ENGINE_SECONDS = 400  # most of an engine
SIDES = ("stock", "patched")


# --- running them -------------------------------------------------------------------------------------------------


class Runs:
    """Starts engines, keeps the clock, and writes what came out."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.begin = time.monotonic()
        self.work = Path(tempfile.mkdtemp(prefix="gpu_sglang."))
        self.cpu = options.device == "cpu"
        self.tokens = 4 if self.cpu else 24
        self.longest = 60.0
        self.found: dict[str, Any] = {"part": options.part, **about()}
        self.lock = threading.RLock()
        self.engines = 0
        self.first_port = 20000 + os.getpid() % 200 * 100  # two of these scripts may run at once

    def out_of_time(self) -> bool:
        """Whether something would not end in time, if it takes what the slowest has taken."""
        return bool(self.options.seconds - (time.monotonic() - self.begin) < self.longest)

    def save(self) -> None:
        with self.lock:
            self.options.out.mkdir(parents=True, exist_ok=True)
            place = self.options.out / f"sglang_{self.options.part}.json"
            place.write_text(json.dumps(self.found, indent=1) + "\n")

    def arguments(self, model: Path, *, deterministic: bool, batches: list[int]) -> dict[str, Any]:
        with self.lock:
            self.engines += 1
            number = self.engines
        given: dict[str, Any] = {
            "model_path": str(model), "dtype": "bfloat16", "device": self.options.device, "random_seed": 0,
            "sampling_backend": "pytorch", "grammar_backend": "none", "skip_tokenizer_init": True,
            "skip_server_warmup": True, "disable_radix_cache": True, "log_level": "warning",
            "max_running_requests": max(batches), "mem_fraction_static": 0.5, "max_total_tokens": 32768,
            "enable_deterministic_inference": deterministic,
            "port": self.first_port + 2 * number, "nccl_port": self.first_port + 2 * number + 1,
        }  # fmt: skip
        if self.cpu:
            more = {"disable_overlap_schedule": True, "disable_cuda_graph": True, "max_total_tokens": 4096}
            return given | more | {"attention_backend": "torch_native", "mem_fraction_static": 0.9}
        graphs = {"cuda_graph_bs_decode": batches, "disable_prefill_cuda_graph": not self.options.prefill_graphs}
        few = {"max_mamba_cache_size": 4 * max(batches)}  # else it takes all the memory there is, and others start too
        if self.options.attention == "torch_native":
            graphs = {"disable_cuda_graph": True}
        return given | {"attention_backend": self.options.attention} | graphs | few

    def engine(self, label: str, side: str, arguments: dict[str, Any]) -> Child:
        """One engine; its report is in the folder of its name."""
        name = f"{label}-{side}-{arguments['nccl_port']}"
        env = {k: v for k, v in os.environ.items() if not k.startswith(("NORM_PLUGIN", "USE_NATIVE"))}
        env["SGLANG_PLUGINS"] = "norm_plugin"
        if side == "patched":
            env |= {"NORM_PLUGIN": "native" if self.cpu else "auto", "NORM_PLUGIN_REPORT": str(self.work / name)}
        with self.lock:
            from norm_plugin.verify.sglang_child import import_only

            import_only([Path(arguments["model_path"])])
            env["SGLANG_DISABLED_MODEL_ARCHS"] = os.environ.pop("SGLANG_DISABLED_MODEL_ARCHS")
        if self.cpu:
            env |= {"SGLANG_USE_CPU_ENGINE": "1", "TORCHDYNAMO_DISABLE": "1", "TRITON_INTERPRET": "1"}
        return Child("gpu_sglang_engine.py", name, self.work, arguments, env, ENGINE_SECONDS)

    def tell(self, found: dict[str, Any], where: str = "models") -> None:
        with self.lock:
            self.found.setdefault(where, []).append(found)
            self.save()
        print(f"[{time.monotonic() - self.begin:4.0f} s]", json.dumps(found), flush=True)


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
    versions = {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()}
    return {"date": now, "gpu": gpu, **versions}


# --- the parts ----------------------------------------------------------------------------------------------------


def difference(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> dict[str, Any]:
    """Of two sets of answers: logprobs are compared up to and with the first other token. The mean is of what differs
    at all, as in `norm-plugin verify`."""
    deltas, same, first = [], 0, []
    for a, b in zip(one, other, strict=True):
        until = next(
            (i for i, (s, t) in enumerate(zip(a["tokens"], b["tokens"], strict=True)) if s != t), len(a["tokens"])
        )
        same += until == len(a["tokens"])
        first.append(until)
        pairs = [*zip(a["of_prompt"], b["of_prompt"], strict=True)]
        pairs += list(zip(a["logprobs"], b["logprobs"], strict=True))[: until + 1]
        deltas += [abs(x - y) for x, y in pairs]
    differ = [delta for delta in deltas if delta > 0]
    return {
        "bitwise": one == other, "same_tokens": f"{same}/{len(one)}", "first_other": first,
        "max_dlogprob": max(deltas), "mean_dlogprob": statistics.fmean(differ) if differ else 0.0,
        "share": len(differ) / len(deltas),
    }  # fmt: skip


def asked(
    runs: Runs, name: str, side: str, orders: list[str], deterministic: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What one engine answers in each order, and what is known of it."""
    model = checkpoint.make(name, runs.work / "models", checkpoint.sizes_for(runs.options.device))
    arguments = runs.arguments(model, deterministic=deterministic, batches=[1, 2, 4, 8])
    with runs.engine(name, side, arguments) as engine:
        known = engine.answer()
        answers = {order: engine.ask("answers", order=order, tokens=runs.tokens) for order in orders}
    if side == "patched":
        known["calls"] = calls(runs.work / engine.name)
    return answers, known


def equal(runs: Runs, name: str) -> dict[str, Any]:
    orders = ["given", "reversed", "alone"]
    s, known = asked(runs, name, "stock", orders, False)
    o, ours = asked(runs, name, "patched", orders, False)
    floor = {order: difference(s["given"], s[order]) for order in orders[1:]}
    patched = {order: difference(s[order], o[order]) for order in orders}
    margins = {"max_dlogprob": MAX_MARGIN, "mean_dlogprob": MEAN_MARGIN}
    inside = all(
        found[what] <= margin * max(of[what] for of in floor.values())
        for found in patched.values()
        for what, margin in margins.items()
    )
    return {"floor": floor, "patched": patched, "inside_the_floor": inside, **known, **ours}


def deterministic(runs: Runs, name: str) -> dict[str, Any]:
    orders = ["given", "again", "reversed", "alone"]
    s, known = asked(runs, name, "stock", orders, True)
    o, ours = asked(runs, name, "patched", orders, True)
    again, _ = asked(runs, name, "patched", ["given"], True)
    own = {order: o["given"] == o[order] for order in orders[1:]}
    own["another process"] = o["given"] == again["given"]
    return {
        "patched_bitwise": own, "all_bitwise": all(own.values()),
        "stock_bitwise": {order: s["given"] == s[order] for order in orders[1:]},
        "patched_and_stock": difference(s["given"], o["given"]), **known, **ours,
    }  # fmt: skip


def each_family(runs: Runs, options: argparse.Namespace) -> None:
    """Several at once: nothing is timed."""
    do = {"equal": equal, "deterministic": deterministic}[options.part]

    def one(name: str) -> None:
        if runs.out_of_time():
            print(f"{name}: no time left", flush=True)
            return
        begin = time.monotonic()
        try:
            found = do(runs, name)
        except RuntimeError as error:
            found = {"failed": str(error)}
        taken = time.monotonic() - begin
        runs.longest = max(runs.longest, taken)
        runs.tell({"model": name, **found, "seconds": round(taken, 1)})

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(one, options.families))


def shots(engines: dict[str, Child], number: int, do: str, **order: Any) -> dict[str, list[Any]]:
    """What each side takes, several times. Neither is always the first."""
    taken: dict[str, list[Any]] = {side: [] for side in SIDES}
    for shot in range(number):
        for side in SIDES if shot % 2 == 0 else SIDES[::-1]:
            taken[side].append(engines[side].ask(do, **order))
    return taken


def speed(runs: Runs, options: argparse.Namespace) -> None:
    mode = options.part == "speed_deterministic"
    make = gemma3 if options.part == "speed_gemma3" else partial(qwen3, shape=options.shape)
    model = make(runs.work, cpu=runs.cpu)
    batches = [1, 2] if runs.cpu else [1, 8, 16, 32, 64]
    prefills = [(1, 32)] if runs.cpu else [(1, 32), (1, 512), (8, 1024)]
    steps = 8 if runs.cpu else 128
    measured: dict[str, dict[str, dict[str, list[float]]]] = {side: {"decode": {}, "prefill": {}} for side in SIDES}
    with ExitStack() as stack:
        pairs: list[dict[str, Child]] = [{} for _ in range(options.processes)]
        for side, engines in product(SIDES, pairs):
            arguments = runs.arguments(model, deterministic=mode, batches=batches) | {"load_format": "dummy"}
            engines[side] = stack.enter_context(runs.engine(model.name, side, arguments))
        known = [engine.answer() for engines in pairs for engine in engines.values()]
        what = {"model": model.name, "sglang": known[0]["sglang"], "steps": steps, "processes": options.processes}
        runs.found |= what | {"measured": measured}
        for repeat in range(options.repeats):
            if runs.out_of_time():
                break
            begin = time.monotonic()
            for batch, engines in product(batches, pairs):
                for side, taken in shots(engines, options.shots, "decode", batch=batch, steps=steps).items():
                    measured[side]["decode"].setdefault(str(batch), []).append(batch * steps / fastest(taken))
            for (n, length), engines in product(prefills, pairs):
                for side, taken in shots(engines, options.shots, "prefill", n=n, length=length).items():
                    measured[side]["prefill"].setdefault(f"{n}x{length}", []).append(min(taken))
            runs.longest = time.monotonic() - begin
            stock, ours = (
                {what: {k: statistics.median(v) for k, v in of.items()} for what, of in measured[side].items()}
                for side in SIDES
            )
            runs.found["repeats"] = repeat + 1
            runs.found["patched_over_stock"] = {
                "decode": {n: ours["decode"][n] / stock["decode"][n] for n in stock["decode"]},
                "prefill": {n: stock["prefill"][n] / ours["prefill"][n] for n in stock["prefill"]},
            }
            runs.save()
    runs.found["calls"] = calls(runs.work / pairs[0]["patched"].name)
    print(json.dumps({"stock": stock, "patched": ours}), flush=True)
    print(json.dumps({**runs.found["patched_over_stock"], "calls": runs.found["calls"]}, indent=1), flush=True)


def kernel(runs: Runs, options: argparse.Namespace) -> None:
    """rows are tokens x 32 heads of 128, as in Qwen3-Next; every call has buffers of its own in turn."""
    import torch
    from sglang.kernels.ops.attention.fla.fused_norm_gate import layer_norm_gated_fwd

    from norm_plugin import rmsnorm_fn
    from norm_plugin.bench.timing import graph_time

    device, width = options.device, 128
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
                row |= {
                    "sglang_us": statistics.median(t for t, _ in times),
                    "ours_us": statistics.median(t for _, t in times),
                }
                row["ratio"] = row["sglang_us"] / row["ours_us"]
            runs.tell(row, "rows")


PARTS = {
    "equal": each_family, "deterministic": each_family, "speed": speed, "speed_deterministic": speed,
    "speed_gemma3": speed, "kernel": kernel,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")), metavar="DIR")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES, help="equal, deterministic")
    parser.add_argument("--shape", choices=("0.6b", "1.7b", "7b"), default="0.6b", help="speed")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="speed, kernel")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="speed: of each side")
    parser.add_argument("--shots", type=int, default=4, metavar="N", help="speed: of which the fastest is a repeat")
    parser.add_argument("--jobs", type=int, default=4, metavar="N", help="equal, deterministic: engines at once")
    parser.add_argument("--attention", default="triton", metavar="NAME", help="not triton for nemotron_h, says SGLang")
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
