"""A made-up run of the benchmark, with times from a formula, for the code that reads the JSON."""

from __future__ import annotations

import random
from dataclasses import asdict
from typing import Any

from norm_plugin.bench import results
from norm_plugin.bench.grid import PARTS, Point, points
from norm_plugin.bench.results import Results

#: The peers, and how much slower than ours they are.
PEERS = {"FlashInfer": 1.22, "sgl_kernel": 1.25, "vllm._C": 1.6, "Liger": 1.4, "torch.nn.functional": 4.0}
FLOOR = 0.59
TERABYTES = 2.9


def microseconds(point: Point) -> float:
    return FLOOR + 0.3 + point.width / 9000 + point.traffic / TERABYTES / 1e6


def times(point: Point, random_: random.Random) -> dict[str, Any]:
    ours = microseconds(point)
    slower = {"norm_plugin": 1.0, **PEERS}
    if point.part == "quant":
        slower["norm alone"] = 0.98
    found = {}
    for name, factor in slower.items():
        excess = (factor - 1) * (0.15 if point.part == "large" and factor < 4 else 1)
        median = ours * (1 + excess) * random_.uniform(0.99, 1.01)
        found[name] = {"median": median, "spread": 0.01 * median, "rounds": [median, 1.01 * median]}
    return found


def entry(point: Point, found: dict[str, Any]) -> dict[str, Any]:
    copy = point.traffic / TERABYTES / 1e6 if point.part == "large" else None
    return {**asdict(point), "label": point.label, "traffic": point.traffic, "copy_us": copy, "times": found}


def sample() -> Results:
    """A run with all parts."""
    random_ = random.Random(0)
    made = results.empty()
    for part in PARTS:
        made["runs"][part] = {
            "date": "2026-01-02T03:04:05+00:00",
            "gpu": "Some GPU",
            "commit": "0123456789ab",
            "floor": {"median": FLOOR, "spread": 0.01},
        }
        made["points"] += [entry(point, times(point, random_)) for point in points(part)]
    cost = {"norm_plugin": 7.0, "FlashInfer": 8.5, "vllm._C": 7.5}
    made["host"] = [{"call": "rmsnorm", "times": {who: {"median": us, "spread": 0.1} for who, us in cost.items()}}]
    made["memory"] = [{"call": "rmsnorm", "allocated": 524288, "output": 524288, "error": ""}]
    return made
