"""Make the table of launch configurations for the GPU at hand: every candidate is timed, the best of each width kept.

A configuration may not depend on the number of rows, so one is chosen for all of them, decode sizes and large ones: the
one whose times over the best times found have the least geometric mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from itertools import product

import torch
from triton.runtime.errors import OutOfResources

from norm_plugin import dispatch
from norm_plugin.bench import tuning
from norm_plugin.bench.buffers import DTYPE, Buffers
from norm_plugin.bench.grid import Point, warm_buffers
from norm_plugin.bench.our_calls import OURS
from norm_plugin.bench.timing import graph_time
from norm_plugin.bench.tuning import Measured, compile_together, grouped
from norm_plugin.kernels import configs

#: Table -> the op that is timed for it.
OPS = {
    "rms": "rms", "add": "add", "layer": "layer", "gated": "gated",
    "static": "static_quant", "token": "token_quant", "block": "block_quant",
}  # fmt: skip
WIDTHS = (
    64, 128, 256, 512, 1024, 1280, 1536, 2048, 2880, 4096, 5120, 5376, 7168, 8192, 12288, 16384, 18432, 32768, 65536,
    131072,
)  # fmt: skip
DECODE_ROWS = (1, 16, 64, 256)
#: In rows up to this size the next kernel may start after the row is read, in longer ones at once: that was faster at
#: nearly every width.
LATE_BYTES = 8192
LARGE_BYTES = (4 << 20, 64 << 20)


@dataclass(frozen=True)
class Candidate(tuning.Candidate):
    warps: int
    rows: int
    late: int
    lean: int
    vector: int

    def point(self, rows: int) -> Point:
        return Point("tune", OPS[self.table], rows, self.width)


def candidates(table: str, width: int) -> Iterator[Candidate]:
    """Every configuration that leaves each thread a sensible share of a row."""
    for warps in (1, 2, 4, 8, 16, 32):
        for rows in (1, 2, 4, 8, 16, 32):
            share = width * rows / (warps * 32)
            fits = 2 <= share <= 32 if rows > 1 else 4 <= share <= 72 or (warps >= 8 and width >= 32768)
            if fits and (rows == 1 or width <= 2048):
                late = int(width * DTYPE.itemsize <= LATE_BYTES)
                leans = (0, 1) if width >= 1024 else (0,)
                vectors = (16, 8) if width >= 2048 else (16,)  # a narrower chunk leaves fewer lanes idle at the end
                yield from (Candidate(table, width, warps, rows, late, *rest) for rest in product(leans, vectors))


def forced(c: Candidate) -> AbstractContextManager[None]:
    """The candidate in place of any table."""
    return configs.forced(c.warps, c.rows, c.late, c.lean, c.vector)


def row_counts(width: int) -> list[int]:
    """Decode sizes (more rows where they are short: a token has many heads), and two large ones."""
    heads = max(1, 2048 // width)
    return [rows * heads for rows in DECODE_ROWS] + [max(1, size // (width * 2)) for size in LARGE_BYTES]


def compile_all(chunk: list[Candidate]) -> None:
    """Fill Triton's cache; run in processes of their own, since compiling takes most of the time."""
    for c in chunk:
        with forced(c), suppress(OutOfResources):
            dispatch.reset()
            for rows in (2, 132 * c.lean * c.rows + 1):  # the kernel that reads weights with the row, and the lean one
                point = c.point(rows)
                Buffers(point).call(OURS[point.op])()
    torch.cuda.synchronize()


def measure(c: Candidate) -> Measured[Candidate]:
    """The times of one candidate."""
    times = {}
    with forced(c):
        dispatch.reset()
        for rows in row_counts(c.width):
            point = c.point(rows)
            large = point.traffic >= 32 << 20
            count = 3 if large else warm_buffers(point.traffic)
            calls = [Buffers(point).call(OURS[point.op]) for _ in range(count)]
            times[rows] = graph_time(calls, replays=12, launches=6 if large else 64).median
    return Measured(c, times)


def cost(m: Measured[Candidate], best: dict[int, float]) -> float:
    """The geometric mean of the times over the best ones; the largest size counts as much as all decode sizes."""
    ratios = [math.log(time / best[rows]) for rows, time in m.times.items()]
    return sum(ratios) / len(ratios) + max(0.0, ratios[-1] - 0.01)


def choose(measured: Iterable[Measured[Candidate]]) -> Measured[Candidate]:
    """The best of the candidates of one table and width."""
    found = list(measured)
    best = {rows: min(m.times[rows] for m in found) for rows in found[0].times}
    return min(found, key=lambda m: cost(m, best))


def tune(tables: Iterable[str] = tuple(OPS), widths: Iterable[int] = WIDTHS) -> list[Measured[Candidate]]:
    """All measurements, for `table` to choose from."""
    every = [c for table in tables for width in widths for c in candidates(table, width)]
    compile_together(compile_all, every)
    found = []
    for candidate in every:
        with suppress(OutOfResources):  # what needs more shared memory or registers than there are is no candidate
            found.append(measure(candidate))
    return found


def table(measured: Iterable[Measured[Candidate]]) -> dict[str, list[list[int]]]:
    """Table -> entries for configs.json. A width between two measured ones takes the wider one's entry."""
    entries: dict[str, list[list[int]]] = {}
    for (table, width), group in grouped(measured):
        c = choose(group).candidate
        entry = [width * DTYPE.itemsize, c.warps, c.rows, c.late, c.lean, c.vector]
        entries.setdefault(table, []).append(entry)
    return entries
