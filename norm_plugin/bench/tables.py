"""Markdown tables of a run, for the README.

python -m norm_plugin.bench.tables bench.json
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from norm_plugin.bench.grid import PARTS
from norm_plugin.bench.peers import OUR_NAME
from norm_plugin.bench.results import Results, load, of_part
from norm_plugin.bench.summary import against, failures, geomean, of_copy, over_alone, terabytes

#: The decode sizes that are shown one by one.
SHOWN_ROWS = (1, 64)
SHOWN_WIDTHS = (2880, 4096, 7168, 16384)
SHOWN_OPS = ("rms", "add", "layer", "gated")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its first column to the left and the others to the right."""
    lines = ["| " + " | ".join(head) + " |", "|" + "|".join(["---"] + ["---:"] * (len(head) - 1)) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def overview(results: Results) -> str:
    """Each op of each part: how many points, the mean and the worst of ours over the fastest peer."""
    rows = []
    for part in PARTS:
        for op in dict.fromkeys(point["op"] for point in of_part(results, part)):
            chosen = of_part(results, part, op)
            pairs = [found for point in chosen if (found := against(point))]
            if not pairs:
                continue
            worst = max(pairs, key=lambda pair: pair.ratio)
            rival = Counter(pair.peer for pair in pairs).most_common(1)[0][0]
            missed = sum(bool(failures(point)) for point in chosen)
            mean = geomean(pair.ratio for pair in pairs)
            size = worst.point["label"].partition(" ")[2]
            rows.append(
                [f"{part}, {op}", str(len(chosen)), f"{mean:.2f}", f"{worst.ratio:.2f} ({size})", rival, str(missed)]
            )
    head = ("sizes, op", "points", "mean of ours / fastest peer", "worst", "most often fastest peer", "bars missed")
    return table(head, rows)


def decode(results: Results, op: str) -> str:
    """Microseconds of an op at some decode sizes, everyone's."""
    points = [
        point
        for point in of_part(results, "decode", op)
        if point["rows"] in SHOWN_ROWS and point["width"] in SHOWN_WIDTHS
    ]
    points.sort(key=lambda point: (point["rows"], point["width"]))
    names = list(dict.fromkeys(name for point in points for name in point["times"]))
    rows = []
    for point in points:
        medians = {name: time["median"] for name, time in point["times"].items()}
        least = min(medians.values(), default=0.0)
        shown = {name: f"**{time:.2f}**" if time == least else f"{time:.2f}" for name, time in medians.items()}
        cells = [shown.get(name, "") for name in names]
        rows.append([f"{point['rows']} x {point['width']}", *cells])
    return table(("M x N", *names), rows)


def large(results: Results) -> str:
    """Percent of the best plain copy, and TB/s, of ours: a line for each width and a column for each op."""
    points = [point for point in of_part(results, "large") if OUR_NAME in point["times"] and point["copy_us"]]
    ops = list(dict.fromkeys(point["op"] for point in points))
    rows = []
    for width in sorted({point["width"] for point in points}):
        cells = []
        for op in ops:
            found = [point for point in points if point["op"] == op and point["width"] == width]
            worst = min(found, key=lambda point: of_copy(point) or 0.0, default=None)
            cells.append(f"{of_copy(worst):.1%} ({terabytes(worst):.2f})" if worst else "")
        rows.append([str(width), *cells])
    return table(("N", *ops), rows)


def quant(results: Results) -> str:
    """Fused quantisation: ours over the norm alone, and over vLLM's or whoever is the fastest."""
    rows = []
    for point in of_part(results, "quant"):
        pair, alone = against(point), over_alone(point)
        theirs = f"{pair.ratio:.2f} x {pair.peer}" if pair else ""
        ours = point["times"].get(OUR_NAME, {}).get("median")
        rows.append(
            [point["label"], f"{ours:.2f}" if ours else "", f"{alone:.2f}" if alone is not None else "", theirs]
        )
    return table(("op and size", "us", "over the norm alone", "over the fastest peer"), rows)


def host(results: Results) -> str:
    """Host microseconds of one eager call."""
    names = list(dict.fromkeys(name for entry in results["host"] for name in entry["times"]))
    rows = []
    for entry in results["host"]:
        times = entry["times"]
        rows.append([entry["call"], *(f"{times[name]['median']:.1f}" if name in times else "" for name in names)])
    return table(("call", *names), rows)


def markdown(results: Results) -> str:
    """All tables for which there are numbers, each with a line that says what it is."""
    parts = ["Ours over the fastest peer at each point, by op:", overview(results)]
    for op in SHOWN_OPS:
        if of_part(results, "decode", op):
            parts += [f"Decode, {op}, microseconds in a CUDA graph:", decode(results, op)]
    if of_part(results, "large"):
        parts += ["Large sizes, percent of the best plain copy of as many bytes (TB/s):", large(results)]
    if of_part(results, "quant"):
        parts += ["Quantised outputs:", quant(results)]
    if results["host"]:
        parts += ["Host cost of one eager call, microseconds:", host(results)]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Prints a run of the benchmark as Markdown tables.")
    parser.add_argument("json", type=Path, help="what the benchmark has written")
    print(markdown(load(parser.parse_args().json)), end="")


if __name__ == "__main__":
    main()
