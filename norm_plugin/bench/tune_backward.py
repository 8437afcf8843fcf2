"""The table of the backward kernels' launch configurations for the GPU at hand: every candidate is timed.

The backward op alone is timed. A configuration may not depend on the number of rows, so the one is chosen that is best
in the mean of ROWS.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import torch
from triton.runtime.errors import OutOfResources

from norm_plugin import dispatch, settings
from norm_plugin.bench import tuning
from norm_plugin.bench.buffers import DTYPE, EPS, Buffers
from norm_plugin.bench.grid import Point
from norm_plugin.bench.timing import Call, graph_time
from norm_plugin.bench.tuning import Measured, compile_together, grouped
from norm_plugin.gradients import GATED_NORM_BACKWARD, LAYERNORM_BACKWARD, RMSNORM_BACKWARD
from norm_plugin.kernels import backward_configs as configs

TABLES = ("rms", "add", "layer", "gated")
WIDTHS = (1024, 2048, 4096, 8192, 16384, 32768)
ROWS = (4096, 16384)

#: Elements a thread. Fewer leave it too little to do between two barriers; more do not fit its registers. Programs of 8
#: warps and more have at most half of MOST.
FEWEST, MOST = 8, 64

#: Warps that a multiprocessor is kept busy with.
BUSY = (16, 24, 32)


@dataclass(frozen=True)
class Candidate(tuning.Candidate):
    """No entry means the parts of rows beyond the table."""

    entry: tuple[int, ...]


def kernels(width: int) -> Iterator[tuple[int, int, int]]:
    """(warps, rows, stages) that leave each thread a sensible share of a row."""
    for warps in (2, 4, 8) if width < 8192 else (4, 8, 16, 32):
        for rows in (1, 2, 4, 8, 16):
            share = width * rows / (warps * 32)
            if FEWEST <= share <= (MOST if warps < 8 else MOST // 2) and (rows == 1 or width <= 1024):
                yield from ((warps, rows, stages) for stages in (1, 2))


def candidates(table: str, width: int) -> Iterator[Candidate]:
    for warps, rows, stages in kernels(width):
        for programs in sorted({max(1, busy // warps) for busy in BUSY}):
            yield Candidate(table, width, (warps, rows, programs, stages))
    if width >= 16384:
        yield Candidate(table, width, ())


def call(table: str, rows: int, width: int) -> Call:
    s = Buffers(Point("tune", f"{table}_backward", rows, width))
    if table == "layer":
        return partial(dispatch.call, LAYERNORM_BACKWARD, s.dy, s.x, s.w, s.b, EPS, True, True)
    if table == "gated":
        how = (EPS, None, True, True, "silu", True, True)
        return partial(dispatch.call, GATED_NORM_BACKWARD, s.dy, s.x, s.w, None, s.z, *how)
    return partial(
        dispatch.call, RMSNORM_BACKWARD, s.dy, s.x, s.w, s.dr if table == "add" else None, EPS, False, None, True
    )


def compile_all(chunk: list[Candidate]) -> None:
    """Fill Triton's cache, in a process of its own: compiling takes most of the time."""
    with settings.override(backend="triton", strict=True):
        for c in chunk:
            with configs.forced(*c.entry), suppress(OutOfResources, dispatch.BackendError):
                dispatch.reset()
                call(c.table, 3, c.width)()
    torch.cuda.synchronize()


def measure(c: Candidate, calls: dict[int, list[Call]]) -> dict[int, float]:
    """Microseconds by number of rows; none where the kernel cannot run."""
    times = {}
    with configs.forced(*c.entry), suppress(OutOfResources, dispatch.BackendError):
        dispatch.reset()
        for rows in ROWS:
            times[rows] = graph_time(calls[rows], replays=7, launches=6).median
    return times


def cost(times: dict[int, float], best: dict[int, float]) -> float:
    """The geometric mean of the times over the best ones."""
    return math.exp(sum(math.log(times[rows] / best[rows]) for rows in ROWS) / len(ROWS))


def tune(tables: Iterable[str] = TABLES, widths: Iterable[int] = WIDTHS) -> list[Measured[Candidate]]:
    """All measurements, for `table` to choose from; what cannot run here is not among them."""
    places = [(table, width) for table in tables for width in widths]
    every = [c for place in places for c in candidates(*place)]
    compile_together(compile_all, every)
    measured = []
    with torch.no_grad(), settings.override(backend="triton", strict=True):
        for table, width in places:
            calls = {rows: [call(table, rows, width) for _ in range(3)] for rows in ROWS}
            found = (Measured(c, measure(c, calls)) for c in candidates(table, width))
            measured += [m for m in found if len(m.times) == len(ROWS)]
    return measured


def table(measured: Iterable[Measured[Candidate]]) -> dict[str, list[list[int]]]:
    """Table -> entries for backward_configs.json; a width whose best are the parts of rows has none."""
    entries: dict[str, list[list[int]]] = {}
    for (table, width), group in grouped(measured):
        best = {rows: min(m.times[rows] for m in group) for rows in ROWS}
        chosen = min(group, key=lambda m: cost(m.times, best)).candidate
        if chosen.entry:
            entries.setdefault(table, []).append([width * DTYPE.itemsize, *chosen.entry])
    return entries
