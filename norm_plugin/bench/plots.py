"""Two pictures of a run: decode times above the floor, and large sizes in percent of a plain copy.

python -m norm_plugin.bench.plots bench.json docs/pictures
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from norm_plugin.bench.grid import ITEMSIZE, LARGE_BYTES
from norm_plugin.bench.peers import ALONE_NAME, OUR_NAME
from norm_plugin.bench.results import Results, load, of_part
from norm_plugin.bench.summary import COPY_BAR

try:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ModuleNotFoundError:
    sys.exit("norm_plugin.bench.plots draws with matplotlib, which is not installed: pip install 'norm-plugin[plots]'.")

TITLES = {
    "rms": "RMSNorm",
    "add": "fused add + RMSNorm",
    "gemma": "Gemma RMSNorm",
    "layer": "LayerNorm",
    "gated": "gated RMSNorm",
    "groups": "gated, groups of 512",
}
DECODE_SHOWN = ("rms", "add", "gemma", "layer", "gated")
LARGE_SHOWN = (*DECODE_SHOWN, "groups")
DECODE_ROWS = (1, 64)

#: Ours in a colour and heavy; the fastest of the others dark; everyone else is there, but not in the way.
OURS: dict[str, Any] = {"color": "#d1495b", "linewidth": 2.8, "marker": "o", "markersize": 5, "zorder": 5}
FASTEST: dict[str, Any] = {"color": "#22333b", "linewidth": 1.8, "marker": "s", "markersize": 4, "zorder": 4}
OTHERS: dict[str, Any] = {"color": "#a9b4bd", "linewidth": 0.9, "zorder": 2}
LIMIT: dict[str, Any] = {"color": "#3d7ea6", "linewidth": 1.4, "linestyle": (0, (5, 3)), "zorder": 3}

Value = Callable[[dict[str, Any], str], float]


def series(points: Iterable[dict[str, Any]], value: Value) -> dict[str, list[tuple[int, float]]]:
    """Name -> (width, value) of every contender."""
    found: dict[str, list[tuple[int, float]]] = {}
    for point in sorted(points, key=lambda point: point["width"]):
        for name in point["times"]:
            if name != ALONE_NAME:
                found.setdefault(name, []).append((point["width"], value(point, name)))
    return found


def best_of(lines: dict[str, list[tuple[int, float]]], pick: Callable[[Iterable[float]], float]) -> Any:
    """The best of the others at each width."""
    at: dict[int, list[float]] = {}
    for name, line in lines.items():
        if name != OUR_NAME:
            for width, value in line:
                at.setdefault(width, []).append(value)
    return [(width, pick(values)) for width, values in sorted(at.items())]


def draw(axes: Axes, lines: dict[str, list[tuple[int, float]]], pick: Callable[[Iterable[float]], float]) -> None:
    """Everyone, then the best of the others, then ours on top."""
    first = True
    for name, line in lines.items():
        if name != OUR_NAME:
            axes.plot(*zip(*line, strict=True), label="the other peers" if first else None, **OTHERS)
            first = False
    if best := best_of(lines, pick):
        axes.plot(*zip(*best, strict=True), label="the fastest peer at that size", **FASTEST)
    if ours := lines.get(OUR_NAME):
        axes.plot(*zip(*ours, strict=True), label="norm_plugin", **OURS)


def width_axis(axes: Axes, widths: Sequence[int], ticks: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    shown = [tick for tick in ticks if min(widths) <= tick <= max(widths)]
    axes.set_xticks(shown, [f"{tick // 1024}K" for tick in shown])
    axes.set_xlim(min(widths) / 1.12, max(widths) * 1.12)
    axes.grid(True, color="#e6e9ec", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def finished(figure: Figure, axes: Sequence[Axes], title: str, results: Results, part: str) -> Figure:
    """With a title, and one legend for the whole figure, ours first."""
    run = results["runs"].get(part, {})
    where = f"{run.get('gpu', '')}, bf16, {run.get('date', '')[:10]}, commit {run.get('commit', '')[:10]}"
    figure.suptitle(f"{title}\n{where}", fontsize=13)
    found = {label: handle for a in axes for handle, label in zip(*a.get_legend_handles_labels(), strict=True)}
    order = sorted(found, key=lambda label: (label != "norm_plugin", "fastest" not in label))
    figure.legend(
        [found[label] for label in order], order, loc="lower center", ncols=len(order), frameon=False, fontsize=11
    )
    figure.tight_layout(rect=(0, 0.05, 1, 0.99))
    return figure


def decode(results: Results) -> Figure:
    """Microseconds over the width, a column for each op and a line of panels for each number of rows."""
    ops = [op for op in DECODE_SHOWN if of_part(results, "decode", op)]
    figure, grid = pyplot.subplots(
        len(DECODE_ROWS), len(ops), figsize=(3.5 * len(ops), 6.6), sharey="row", squeeze=False
    )
    floor = results["runs"].get("decode", {}).get("floor", {}).get("median")
    for line, rows in enumerate(DECODE_ROWS):
        for column, op in enumerate(ops):
            axes = grid[line][column]
            points = [point for point in of_part(results, "decode", op) if point["rows"] == rows]
            if not points:
                continue
            draw(axes, series(points, lambda point, name: point["times"][name]["median"]), min)
            if floor:
                axes.axhline(floor, label=f"the floor: an empty kernel, {floor:.2f} us", **LIMIT)
            width_axis(axes, [point["width"] for point in points], (1024, 2048, 4096, 8192, 16384))
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(matplotlib.ticker.FixedLocator([0.5, 1, 2, 4, 8, 16, 32]))
            axes.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
            axes.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
            if line == 0:
                axes.set_title(TITLES[op], fontsize=13)
            if line == len(DECODE_ROWS) - 1:
                axes.set_xlabel("N", fontsize=11)
            if column == 0:
                axes.set_ylabel(f"{rows} row{'s' if rows > 1 else ''}: microseconds", fontsize=11)
    title = "Decode sizes: time of one call in a CUDA graph"
    return finished(figure, list(grid.flat), title, results, "decode")


def percent(point: dict[str, Any], name: str) -> float:
    return 100 * float(point["copy_us"]) / float(point["times"][name]["median"])


def large(results: Results) -> Figure:
    """Percent of the best plain copy over the width, a panel for each op, at the smallest of the large sizes."""
    ops = [op for op in LARGE_SHOWN if of_part(results, "large", op)]
    columns = min(3, len(ops))
    lines = -(-len(ops) // columns)
    figure, grid = pyplot.subplots(
        lines, columns, figsize=(4.6 * columns, 3.5 * lines + 0.6), sharey=True, squeeze=False
    )
    for i, op in enumerate(ops):
        axes = grid[i // columns][i % columns]
        points = [
            point
            for point in of_part(results, "large", op)
            if point["copy_us"] and point["rows"] * point["width"] * ITEMSIZE < 2 * LARGE_BYTES[0]
        ]
        if not points:
            continue
        draw(axes, series(points, percent), max)
        axes.axhline(100 * COPY_BAR, label=f"{COPY_BAR:.0%} of the copy", **LIMIT)
        width_axis(axes, [point["width"] for point in points], [1024 * 2**n for n in range(8)])
        axes.set_ylim(0, 108)
        axes.set_title(TITLES[op], fontsize=13)
        if i // columns == lines - 1:
            axes.set_xlabel("N", fontsize=11)
        if i % columns == 0:
            axes.set_ylabel("% of the best plain copy", fontsize=11)
    for axes in grid.flat[len(ops) :]:
        axes.set_visible(False)
    title = "Large sizes, 64 MB of input: speed beside a plain copy"
    return finished(figure, list(grid.flat), title, results, "large")


def pictures(results: Results, folder: Path) -> list[Path]:
    """Those of the two for which there are points."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, make in {"decode": decode, "large": large}.items():
        if of_part(results, name):
            figure = make(results)
            path = folder / f"{name}.png"
            figure.savefig(path, dpi=110)
            pyplot.close(figure)
            written.append(path)
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description="Draws the pictures of a run of the benchmark.")
    parser.add_argument("json", type=Path, help="what the benchmark has written")
    parser.add_argument("folder", type=Path, help="where the pictures go")
    options = parser.parse_args()
    for path in pictures(load(options.json), options.folder):
        print(path)


if __name__ == "__main__":
    main()
