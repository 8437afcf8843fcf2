"""What the measurements of engines share: their command line, the models, the clock, and the file of results.

A measurement is a function of a Lab, a model's name and a mode, which returns what it found: see deterministic.py.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count, product
from pathlib import Path
from typing import Any

from benchmarks import engines, models, records
from benchmarks.engines import Engine
from norm_plugin.engines import ENGINES
from norm_plugin.tiny_models import checkpoint

#: Which norms are the engine's own in a run, and which ours.
SIDES = ("stock", "patched")

#: Fewer than there are prompts, so that requests in another order are computed in other batches.
FEW_REQUESTS, FEW_TOKENS = 8, 128

Measure = Callable[["Lab", str, str], dict[str, Any]]


def parser(description: str | None, kinds: Sequence[str] = ENGINES) -> argparse.ArgumentParser:
    """The arguments of every measurement of an engine."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("engine", choices=kinds)
    found.add_argument("--models", nargs="+", metavar="NAME", help=f"tiny:NAME, or {', '.join(models.PUBLISHED)}")
    found.add_argument("--layers", type=int, metavar="N", help="of each published model")
    found.add_argument("--modes", nargs="+", metavar="MODE", help=f"by engine: {engines.MODES}; default: all of them")
    found.add_argument("--scope", default="eager", choices=("eager", "all"), help="NORM_PLUGIN_SCOPE")
    found.add_argument("--tp", type=int, default=1, metavar="N", help="tensor parallelism")
    found.add_argument("--set", nargs="*", default=[], metavar="NAME=JSON", help="other arguments of the engine")
    found.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: a rehearsal, with tiny models")
    found.add_argument("--seconds", type=float, default=540, metavar="S", help="start nothing that ends after that")
    found.add_argument("--json", type=Path, metavar="FILE", help="a later run replaces what it measures again")
    return found


def check(argument: str, given: Sequence[str], known: Sequence[str]) -> None:
    """End the process where it does not know a name."""
    if unknown := [name for name in given if name not in known]:
        sys.exit(f"{argument} {' '.join(unknown)}: there are {', '.join(known)}")


class Lab:
    """One run of a measurement."""

    def __init__(self, part: str, options: argparse.Namespace) -> None:
        self.part, self.options, self.kind = part, options, str(options.engine)
        self.cuda = options.device == "cuda"
        self.path: Path = options.json or records.default(part)
        self.begin, self.longest = time.monotonic(), 60.0
        self.work = Path(tempfile.mkdtemp(prefix=f"{part}."))
        self.lock, self.ports = threading.Lock(), count(20000 + os.getpid() % 200 * 100, 2)
        self.rows, self.failed = records.read(self.path), 0

    def engine(
        self, model: str, mode: str, side: str, requests: int = FEW_REQUESTS, at_once: int = FEW_TOKENS
    ) -> Engine:
        """Start one side of a model. The weights of a published one are random, and of a real one's size."""
        published = not model.startswith("tiny:")
        with self.lock:
            port = next(self.ports)
            if published:
                place = models.write(model, self.options.layers, self.work / "models")
            else:
                sizes = checkpoint.sizes_for(self.options.device)
                place = checkpoint.make(model.removeprefix("tiny:"), sizes=sizes)
        given = engines.arguments(self.kind, mode, requests, at_once, self.cuda, port)
        if published:
            given |= models.of_engine(self.kind, model)
        ours = {"NORM_PLUGIN": "auto" if self.cuda else "native", "NORM_PLUGIN_SCOPE": self.options.scope}
        words = ["--device", self.options.device, "--mode", mode if self.kind == "vllm" else "eager"]
        words += ["--tp", str(self.options.tp)]
        words += ["--set", *(f"{name}={json.dumps(value)}" for name, value in given.items()), *self.options.set]
        folder = self.work / f"{model.replace(':', '-')}-{mode}-{side}-{port}"
        flags = ours if side == "patched" else {"NORM_PLUGIN": "off"}
        first = ["randomise"] if published and self.kind == "vllm" else []
        return Engine(self.kind, place, folder, flags, words, self.options.seconds, first)

    def run(self, measure: Measure, default: Sequence[str], at_once: int = 1) -> None:
        """Every model in every mode, `at_once` of them; whatever fails is kept with its reason. Ends the process."""
        modes, wanted = self.options.modes or engines.MODES[self.kind], self.options.models or default
        check("--modes", modes, engines.MODES[self.kind])
        known = [f"tiny:{name}" for name in checkpoint.names(self.kind)]
        if self.cuda or self.kind == "sglang":  # vLLM packs weights for a CPU, and what randomises them comes too late
            known += models.PUBLISHED
        check("--models", wanted, known)
        todo = product(modes, wanted)
        if at_once == 1 or not self.cuda:  # in this thread, where Ctrl-C ends the engines
            for mode, model in todo:
                self._one(measure, mode, model)
        else:
            with ThreadPoolExecutor(at_once) as pool:
                list(pool.map(lambda of: self._one(measure, *of), todo))
        print(f"written to {self.path}; logs in {self.work}", flush=True)
        sys.exit(bool(self.failed))

    def _one(self, measure: Measure, mode: str, model: str) -> None:
        begin = time.monotonic()
        if self.options.seconds - (begin - self.begin) < self.longest:
            print(f"no time left for {model}, {mode}", flush=True)
            self.failed += 1
            return
        what = {"part": self.part, "engine": self.kind, "model": model, "mode": mode, "scope": self.options.scope}
        try:
            found = measure(self, model, mode)
        except RuntimeError as error:
            found = {"error": str(error)}
            self.failed += 1
        taken = time.monotonic() - begin
        with self.lock:
            self.longest = max(self.longest, taken)
            self.rows = [row for row in self.rows if any(row.get(name) != what[name] for name in what)]
            self.rows.append({**what, **found, "seconds": round(taken, 1)})
            records.write(self.path, self.rows)
            print(f"[{time.monotonic() - self.begin:4.0f} s]", json.dumps(self.rows[-1])[:2500], flush=True)
