"""What the numbers say: the worst point of each op first, the geometric means, and the bars."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from norm_plugin.bench.grid import PARTS
from norm_plugin.bench.peers import ALONE_NAME, OUR_NAME
from norm_plugin.bench.results import Results, of_part

DECODE_BAR, GEOMEAN_BAR = 1.02, 0.80
COPY_BAR = 0.97
WIDE, WIDE_TERABYTES = 65536, 2.5
QUANT_BAR, QUANT_ROWS = 1.05, 2048
HOST_PEER = "FlashInfer"


@dataclass(frozen=True)
class Against:
    """A point: ours over the fastest peer, and who that is."""

    point: dict[str, Any]
    ours: float
    peer: str
    theirs: float

    @property
    def ratio(self) -> float:
        return self.ours / self.theirs


def against(point: dict[str, Any]) -> Against | None:
    """Ours beside the fastest peer; None where either is missing."""
    medians = {name: time["median"] for name, time in point["times"].items()}
    peers = {name: median for name, median in medians.items() if name not in (OUR_NAME, ALONE_NAME)}
    if OUR_NAME not in medians or not peers:
        return None
    fastest = min(peers, key=lambda name: peers[name])
    return Against(point, medians[OUR_NAME], fastest, peers[fastest])


def geomean(ratios: Iterable[float]) -> float:
    logs = [math.log(ratio) for ratio in ratios]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def of_copy(point: dict[str, Any]) -> float | None:
    """The share of the best plain copy's speed; None where the point has no copy or is not measured."""
    if not point.get("copy_us") or OUR_NAME not in point["times"]:
        return None
    return float(point["copy_us"] / point["times"][OUR_NAME]["median"])


def terabytes(point: dict[str, Any]) -> float:
    """Our TB/s of what must be moved."""
    return float(point["traffic"] / point["times"][OUR_NAME]["median"] / 1e6)


def over_alone(point: dict[str, Any]) -> float | None:
    """A fused quantisation over the norm alone."""
    times = point["times"]
    if OUR_NAME not in times or ALONE_NAME not in times:
        return None
    return float(times[OUR_NAME]["median"] / times[ALONE_NAME]["median"])


def failures(point: dict[str, Any]) -> list[str]:
    """The bars that a point misses."""
    if OUR_NAME not in point["times"]:
        return ["ours did not run"]
    missed = []
    compared, copied, alone = against(point), of_copy(point), over_alone(point)
    if point["part"] == "large":
        if copied is not None and copied < COPY_BAR:
            missed.append(f"{copied:.1%} of copy")
        if point["width"] >= WIDE and terabytes(point) < WIDE_TERABYTES:
            missed.append(f"{terabytes(point):.2f} TB/s")
        return missed
    if compared and compared.ratio > DECODE_BAR:
        missed.append(f"{compared.ratio:.3f} of {compared.peer}")
    if alone is not None and point["rows"] >= QUANT_ROWS and alone > QUANT_BAR:
        missed.append(f"{alone:.3f} of the norm alone")
    return missed


def described(point: dict[str, Any]) -> str:
    """One line of a point: ours, the fastest peer, the copy, the bars it misses."""
    words = [f"{point['label']:<34}"]
    if OUR_NAME in point["times"]:
        words.append(f"ours {point['times'][OUR_NAME]['median']:8.2f} us")
    if compared := against(point):
        words.append(f"{compared.ratio:.3f} x {compared.peer} ({compared.theirs:.2f})")
    if (copied := of_copy(point)) is not None:
        words.append(f"{copied:.1%} of copy, {terabytes(point):.2f} TB/s")
    if (alone := over_alone(point)) is not None:
        words.append(f"{alone:.3f} x the norm alone")
    missed = failures(point)
    return "  ".join(words) + (f"  MISSES: {'; '.join(missed)}" if missed else "")


def badness(point: dict[str, Any]) -> float:
    """What the points of an op are sorted by: beside a copy at large sizes, beside the fastest peer elsewhere."""
    if OUR_NAME not in point["times"]:
        return math.inf
    copied, compared = of_copy(point), against(point)
    if point["part"] == "large" and copied is not None:
        return 1 / copied
    return compared.ratio if compared else 0.0


def op_lines(part: str, op: str, points: Sequence[dict[str, Any]]) -> list[str]:
    """An op's mean, its failures, and its three worst points."""
    ratios = [compared.ratio for point in points if (compared := against(point))]
    missing = [point for point in points if failures(point)]
    mean = geomean(ratios)
    bar = part in ("decode", "cold")
    verdict = ("" if mean <= GEOMEAN_BAR else f" (bar {GEOMEAN_BAR:.2f}: MISSED)") if bar and ratios else ""
    lines = [f"{part} {op}: {len(missing)} of {len(points)} points miss a bar; geometric mean {mean:.3f}{verdict}"]
    for point in sorted(points, key=badness, reverse=True)[:3]:
        lines.append(f"    {described(point)}")
    return lines


def host_lines(host: Sequence[dict[str, Any]]) -> list[str]:
    """Each call's host cost, and whether ours is no more than FlashInfer's."""
    lines = []
    for entry in host:
        medians = {name: time["median"] for name, time in entry["times"].items()}
        shown = ", ".join(f"{name} {median:.2f}" for name, median in medians.items())
        beaten = OUR_NAME in medians and HOST_PEER in medians and medians[OUR_NAME] > medians[HOST_PEER]
        lines.append(f"    {entry['call']:<20} {shown} us" + (f"  MISSES: more than {HOST_PEER}'s" if beaten else ""))
    return lines


def memory_lines(memory: Sequence[dict[str, Any]]) -> list[str]:
    """What each call allocates, where that is not its output alone."""
    wrong = [entry for entry in memory if entry["error"] or entry["allocated"] != entry["output"]]
    lines = [f"memory: {len(memory) - len(wrong)} of {len(memory)} calls allocate their output and nothing else"]
    for entry in wrong:
        what = entry["error"] or f"{entry['allocated']} bytes for an output of {entry['output']}"
        lines.append(f"    {entry['call']}  MISSES: {what}")
    return lines


def left_out_lines(left_out: Sequence[dict[str, Any]]) -> list[str]:
    """Who was left out, where (the first few places) and why."""
    grouped: dict[tuple[str, str], list[str]] = {}
    for entry in left_out:
        grouped.setdefault((entry["peer"], entry["reason"]), []).append(entry["where"] or "everywhere")
    lines = []
    for (peer, why), every in grouped.items():
        where = list(dict.fromkeys(every))
        places = ", ".join(where[:3]) + (f" and {len(where) - 3} more" if len(where) > 3 else "")
        lines.append(f"    {peer} ({places}): {why}")
    return lines


def lines(results: Results) -> list[str]:
    """The whole summary."""
    found: list[str] = []
    for part in PARTS:
        for op in dict.fromkeys(point["op"] for point in of_part(results, part)):
            found += op_lines(part, op, of_part(results, part, op))
    if results["host"]:
        found += ["host cost of one eager call, 1 x 4096:", *host_lines(results["host"])]
    if results["memory"]:
        found += memory_lines(results["memory"])
    if results["left_out"]:
        found += ["left out:", *left_out_lines(results["left_out"])]
    if results["not_measured"]:
        found.append(f"not measured, for want of time: {len(results['not_measured'])} points")
    missing = sum(bool(failures(point)) for point in results["points"])
    found.append(f"{missing} of {len(results['points'])} points miss a bar")
    return found
