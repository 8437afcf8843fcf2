"""Launch configurations of the backward kernels: data, a function of (table, N, element size, GPU).

A program takes `rows` rows at once and keeps them in registers, with its part of the sums. A multiprocessor has
`programs` programs, each with a block of consecutive rows, so the number of partial sums is bounded. The order of the
sums within a row follows from (table, N, element size, GPU) alone; the order of the sums over rows also depends on the
number of rows. `stages` is how many rows are read ahead. Bringing the next row to the L2 cache meanwhile is slower, by
24 to 73 % in the median of all configurations of a table and width (H100, 4096 to 16384 columns).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

from norm_plugin.kernels.configs import Tables, entries, load

#: The bytes of one load of a thread.
VECTOR_BYTES = 16

#: A row that is wider than its table is read twice: first for its statistics, then in parts of PART columns. A program
#: does the same part of many rows.
PART, PART_WARPS, PART_PROGRAMS, PART_STAGES = 2048, 4, 4, 2

#: Rows at once. A second sum or a gate leaves registers for one; with two, a thread spills 80 to 392 bytes (sm_90).
PART_ROWS = {"rms": 2, "add": 2, "layer": 1, "gated": 1}

#: The warps of a program that computes the statistics of such a row, and how many of its chunks are read at once.
STATISTICS_WARPS, STATISTICS_UNROLL = 16, 2

#: The registers of a multiprocessor, and the most that a thread can have.
REGISTERS, MOST_REGISTERS = 65536, 248

#: A weight stays in registers if a thread has at most so many elements of a row.
HOLD_ELEMENTS = 16

#: The last sum: a program's columns of narrow and of wide rows, what counts as wide, partial rows at once, and warps.
SUM_COLUMNS, SUM_COLUMNS_WIDE, SUM_WIDE, SUM_ROWS, SUM_WARPS = 32, 128, 8192, 64, 4


@dataclass(frozen=True)
class Config:
    """How the kernel is launched for rows of one width. `flat`: one thread has all rows of its columns."""

    warps: int
    rows: int
    block: int
    chunks: int
    parts: int
    programs: int
    stages: int
    hold: bool
    flat: bool

    @property
    def registers(self) -> int:
        """The most registers a thread may have, so that all programs of a multiprocessor run at once."""
        return min(MOST_REGISTERS, REGISTERS // (self.programs * self.warps * 32) // 8 * 8)


@cache
def tables() -> Tables:
    """Their entries are [largest row in bytes, warps, rows, programs, stages]."""
    return load("backward_configs.json")


_forced: list[int] | None = None


@contextmanager
def forced(*entry: int) -> Iterator[None]:
    """Binds all launches in the block with one entry of a table; without an entry, as rows that are read in parts."""
    global _forced
    _forced = list(entry)
    try:
        yield
    finally:
        _forced = None


def config(table: str, width: int, itemsize: int, gpu: str) -> Config:
    """The configuration for rows (or groups) of `width` elements of `itemsize` bytes."""
    if _forced is not None:
        return made(width, itemsize, *_forced) if _forced else in_parts(table, width)
    for limit, *entry in entries(tables(), gpu, table):
        if width * itemsize <= limit:
            return made(width, itemsize, *entry)
    return in_parts(table, width)


def made(width: int, itemsize: int, warps: int, rows: int, programs: int, stages: int) -> Config:
    """The configuration of a table's entry: the rest of it follows from the width."""
    power = 1 << (width - 1).bit_length()
    vectors = warps * 32 * VECTOR_BYTES // itemsize
    block = power if rows > 1 else min(power, vectors)
    chunks = -(-width // block)
    hold = block * rows * chunks <= HOLD_ELEMENTS * warps * 32
    flat = rows > 1 and block >= vectors
    return Config(warps, rows, block, chunks, 1, programs, stages, hold, flat)


def in_parts(table: str, width: int) -> Config:
    """The configuration of rows that are too wide for one program."""
    block, rows = min(PART, 1 << (width - 1).bit_length()), PART_ROWS[table]
    return Config(PART_WARPS, rows, block, 1, -(-width // block), PART_PROGRAMS, PART_STAGES, True, flat=block >= PART)
