#!/usr/bin/env python3
"""The real vLLM on a GPU, stock against patched: the same output, and how fast.

    PYTHONPATH=<vLLM and what it needs>:. python3 scripts/gpu_vllm.py PART [--json FILE] [--seconds 540] ...

PART is one of
  same      each family in eager and in default mode (compiled, CUDA graphs): tokens and logprobs of stock and patched,
            beside the noise floor, which is stock against stock with the requests in another order and one by one
  speed     decode throughput, stock and patched engines side by side and taking turns: --mode compiled is vLLM's
            default, --mode eager is --enforce-eager; --repeats 3, of which the median counts, each the fastest of
            --shots 4: what else a host does only ever makes one slower; --processes 3 a side, where each tunes
            what it compiles for itself, and stock is not as fast as stock
  encoder   the norms of a qwen2.5-vl vision encoder, which vLLM runs as eager ops in its default mode

  --families llama gemma3 ...   only these        --modes eager compiled   (same)      --mode compiled|eager   (speed)
  --layers 4                    of each model     --jobs 3                 families at once (speed: they start together)
  --batch 1 32                  requests at once (speed)                   --scope all  compiled code too

The models have published widths, few layers, and random weights made on the GPU: nothing is read but this checkout,
nothing has to be installed. FILE is added to: what a later run finds replaces what an earlier one found of the same
part, family and mode. Nothing that cannot end within --seconds is started. Nothing else may run on the GPU meanwhile.
`--device cpu --layers 0` rehearses with tiny models, and says nothing about speed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import datetime, timezone
from functools import partial
from itertools import chain, product
from pathlib import Path
from typing import Any

from gpu_child import ROOT, Child, fastest, plugin_folder

from norm_plugin.verify.comparison import MAX_MARGIN, MEAN_MARGIN

FAMILIES = (
    "llama", "gemma3", "nemotron_h", "mamba2_groups", "qwen3", "qwen3_next", "falcon_h1", "gpt2", "mamba2",
)  # fmt: skip
SIDES = ("off", "auto")

#: Requests and tokens that an engine takes at once. Few for `same`, so that another order makes other batches: where
#: all requests fit into one, stock in another order gives the very same bits, whatever a server then does.
SIZES: dict[str, Callable[[argparse.Namespace], dict[str, int]]] = {
    "same": lambda _: {"batch": 6, "at_once": 128, "cache_gib": 1},
    "speed": lambda options: {"batch": max(options.batch), "at_once": 2048, "cache_gib": 3},
}


class Results:
    """The file, and the clock."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.path, self.begin = options.json, time.monotonic()
        self.seconds: float = options.seconds
        self.lock = threading.Lock()
        self.found: list[dict[str, Any]] = []
        self.about: dict[str, Any] = {}
        if self.path.exists():
            self.about = json.loads(self.path.read_text())
            self.found = self.about.pop("results")

    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.begin)

    def add(self, result: dict[str, Any]) -> None:
        with self.lock:
            self.about |= {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), **result.pop("about", {})}
            key = ("part", "family", "mode", "scope")
            self.found = [old for old in self.found if any(old.get(k) != result.get(k) for k in key)] + [result]
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps({**self.about, "results": self.found}, indent=1) + "\n")
            print(f"[{time.monotonic() - self.begin:4.0f} s]", json.dumps(result)[:2500], flush=True)


def environment(backend: str, options: argparse.Namespace) -> dict[str, str]:
    """Of an engine of one side."""
    wanted = {
        "VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "OMP_NUM_THREADS": "4", "NORM_PLUGIN": backend, "NORM_PLUGIN_SCOPE": options.scope,
    }  # fmt: skip
    if options.device == "cpu" and backend == "auto":
        wanted["NORM_PLUGIN"] = "native"
    return os.environ | wanted


def engine(work: Path, family: str, mode: str, backend: str, options: argparse.Namespace, number: int = 0) -> Child:
    """One side of one family."""
    wanted = {
        "family": family, "mode": mode, "layers": options.layers, "device": options.device, "folder": str(work),
        **SIZES[options.part](options),
    }  # fmt: skip
    env = environment(backend, options)
    return Child("gpu_vllm_engine.py", f"{family}-{mode}-{backend}-{number}", work, wanted, env, options.seconds)


# --- the same output ----------------------------------------------------------------------------------------------


def distance(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> dict[str, Any]:
    """Of two runs: every token of the prompts, and the answers up to where their tokens part. Means are of what differs
    at all, as in `norm-plugin verify`."""
    prompt, decoded, same, first = [], [], 0, []
    for x, y in zip(one, other, strict=True):
        prompt += [abs(a - b) for a, b in zip(x["prompt"], y["prompt"], strict=True)]
        apart = [a != b for a, b in zip(x["tokens"], y["tokens"], strict=True)]
        common = apart.index(True) if True in apart else len(apart)
        same += common == len(apart)
        first.append(common)
        decoded += [abs(a - b) for a, b in zip(x["logprobs"][:common], y["logprobs"][:common], strict=True)]
    found: dict[str, Any] = {}
    for where, deltas in (("prompt", prompt), ("decoded", decoded)):
        differ = [delta for delta in deltas if delta > 0]
        share = len(differ) / len(deltas) if deltas else 0.0
        mean, most = (statistics.fmean(differ), max(differ)) if differ else (0.0, 0.0)
        found |= {f"{where}_mean": mean, f"{where}_max": most, f"{where}_share": share}
    return found | {"answers_with_equal_tokens": same, "answers": len(one), "first_difference": min(first)}


def within(mine: dict[str, Any], floors: list[dict[str, Any]]) -> bool:
    """By the rule of `norm-plugin verify`: nothing further from stock than stock is from itself, less chance."""
    margins = {"mean": MEAN_MARGIN, "max": MAX_MARGIN}
    return all(
        mine[f"{where}_{what}"] <= margin * max(floor[f"{where}_{what}"] for floor in floors)
        for where in ("prompt", "decoded")
        for what, margin in margins.items()
    )


def same(work: Path, family: str, mode: str, options: argparse.Namespace) -> dict[str, Any]:
    """Stock in three orders, then patched in the first."""
    order = {"count": 16, "length": 24, "tokens": 4 if options.device == "cpu" else 32}
    with engine(work, family, mode, "off", options) as stock:
        about = stock.answer()["about"]
        first, again, other, alone = (
            stock.ask("answers", order=how, **order) for how in ("given", "given", "reversed", "alone")
        )
    with engine(work, family, mode, "auto", options) as patched:
        patched.answer()
        ours = patched.ask("answers", order="given", **order)
        report = patched.ask("report")
    noise = {"reversed": distance(first, other), "alone": distance(first, alone)}
    mine = distance(first, ours)
    return {
        "within_noise": within(mine, list(noise.values())),
        "noise": noise, "ours": mine, "repeated": distance(first, again), **report, "about": about,
    }  # fmt: skip


# --- speed --------------------------------------------------------------------------------------------------------


Sides = dict[str, list[Child]]


def first_words(sides: Sides) -> dict[str, list[Any]] | RuntimeError:
    """What the engines of a family say once they have started, or why one has not."""
    try:
        return {backend: [child.answer() for child in children] for backend, children in sides.items()}
    except RuntimeError as error:
        return error


def speed(engines: Sides, first: dict[str, list[Any]] | RuntimeError, options: argparse.Namespace) -> dict[str, Any]:
    """All engines are there at once; only one works at a time."""
    if isinstance(first, RuntimeError):
        raise first
    tokens = 4 if options.device == "cpu" else options.tokens
    batches: dict[str, Any] = {}
    turns = list(zip(*engines.values(), strict=True))
    for batch in options.batch:
        for child in chain(*turns):  # what is compiled at the first use
            child.ask("decode", count=batch, tokens=8)
        per_second: dict[str, list[float]] = {backend: [] for backend in engines}
        for repeat in range(options.repeats):
            for turn in turns:
                taken: list[list[tuple[float, float]]] = [[] for _ in turn]
                for shot in range(options.shots):
                    order = list(zip(turn, taken, strict=True))
                    for child, times in (
                        order if (repeat + shot) % 2 == 0 else reversed(order)
                    ):  # no side is always first
                        times.append(child.ask("decode", count=batch, tokens=tokens))
                for backend, times in zip(engines, taken, strict=True):
                    per_second[backend].append(batch * tokens / fastest(times))
        ratios = [a / b for a, b in zip(per_second["auto"], per_second["off"], strict=True)]
        batches[str(batch)] = {
            "ratio": statistics.median(per_second["auto"]) / statistics.median(per_second["off"]),
            "ratios": ratios, "stock_tokens_per_s": per_second["off"], "patched_tokens_per_s": per_second["auto"],
        }  # fmt: skip
    started = {backend: [answer["started"] for answer in answers] for backend, answers in first.items()}
    report = engines["auto"][0].ask("report")
    what = {key: getattr(options, key) for key in ("layers", "processes", "repeats", "shots")}
    return {
        **what,
        "tokens": tokens,
        "started": started,
        "batches": batches,
        **report,
        "about": first["auto"][0]["about"],
    }


def encoder(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """In a process of its own, which times vLLM's own layers with and without us."""
    sizes = ["64", "2"] if options.device == "cpu" else ["1280", "32"]
    command = [sys.executable, str(ROOT / "scripts" / "gpu_vllm_encoder.py"), options.device, *sizes]
    paths = [str(plugin_folder(work)), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = environment("off", options) | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(done.stderr[-1500:])
    found: dict[str, Any] = json.loads(done.stdout.rpartition("@")[2])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("same", "speed", "encoder"))
    parser.add_argument("--json", type=Path, default=Path(os.environ.get("OUT", ".")) / "gpu_vllm.json")
    parser.add_argument("--seconds", type=float, default=540)
    parser.add_argument("--families", nargs="*", default=FAMILIES, choices=FAMILIES)
    parser.add_argument("--modes", nargs="*", default=["eager", "compiled"], choices=("eager", "compiled"))
    parser.add_argument("--mode", default="compiled", choices=("eager", "compiled"))
    parser.add_argument("--scope", default="eager", choices=("eager", "all"))
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 32])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--shots", type=int, default=4)
    parser.add_argument("--jobs", type=int, default=3)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    options = parser.parse_args()
    results = Results(options)
    work = Path(tempfile.mkdtemp(prefix="gpu_vllm."))
    longest = [60.0]
    failed = []

    def one(family: str, mode: str, do: Callable[..., dict[str, Any]]) -> None:
        if results.left() < longest[0]:
            print(f"no time for {options.part} {family} {mode}", flush=True)
            failed.append(family)
            return
        begin = time.monotonic()
        what = {"part": options.part, "family": family, "mode": mode, "scope": options.scope}
        try:
            found = do()
        except RuntimeError as error:
            found = {"error": str(error)}
            failed.append(family)
        longest.append(max(longest.pop(), time.monotonic() - begin))
        results.add({**what, **found, "seconds": round(time.monotonic() - begin, 1)})

    if options.part == "encoder":
        results.add({"part": "encoder", **encoder(work, options)})
    elif options.part == "speed":
        for at in range(0, len(options.families), options.jobs):
            with ExitStack() as stack:
                there: dict[str, Sides] = {}
                for family in options.families[at : at + options.jobs]:
                    there[family] = {side: [] for side in SIDES}
                    for number, (side, children) in product(range(options.processes), there[family].items()):
                        begun = engine(work, family, options.mode, side, options, number)
                        children.append(stack.enter_context(begun))
                first = {family: first_words(sides) for family, sides in there.items()}  # then all of them are idle
                for family, sides in there.items():
                    one(family, options.mode, partial(speed, sides, first[family], options))
    else:
        with ThreadPoolExecutor(options.jobs) as pool:
            todo = [(family, mode) for mode in options.modes for family in options.families]
            list(pool.map(lambda of: one(*of, partial(same, work, *of, options)), todo))
    print(f"logs in {work}", flush=True)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
