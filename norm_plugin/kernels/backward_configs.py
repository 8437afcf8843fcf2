"""Launch configurations of the backward kernels: data, a function of (table, N, element size, GPU).

A program keeps a row in registers, with its part of the sums, and takes `rows` rows at once. There are `programs` of
them a multiprocessor, each with a block of consecutive rows, so the number of partial sums is bounded. The order of a
row's sums follows from (table, N, element size, GPU) alone; that of the sums over the rows from the number of rows
besides. `stages` is how many rows are read ahead. To have the next row brought to the L2 cache meanwhile
is slower: by 24 to 73 % in the median of all configurations of a table and width (H100, 4096 to 16384 columns).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

from norm_plugin.kernels.configs import Tables, entries, load

#: What one load of a thread brings.
VECTOR_BYTES = 16

#: A row beyond its table is read twice: for its statistics, and then in parts of so many columns, by programs that do
#: the same part of many rows.
PART, PART_WARPS, PART_PROGRAMS, PART_STAGES = 2048, 4, 4, 2

#: Two rows at once fill the registers: with a second sum, or a gate, a thread would spill 80 to 392 bytes (sm_90).
PART_ROWS = {"rms": 2, "add": 2, "layer": 1, "gated": 1}

#: The warps of a program that computes the statistics of such a row, and how many chunks of it are read at once.
STATISTICS_WARPS, STATISTICS_UNROLL = 16, 2

#: The registers of a multiprocessor, and the most that a thread can have.
REGISTERS, MOST_REGISTERS = 65536, 248

#: The most elements a thread may have of a row for its weight to stay in registers beside the sums.
HOLD_ELEMENTS = 16

#: What a program of the last sum takes: columns of narrow and of wide rows, and partial rows at once.
SUM_COLUMNS, SUM_COLUMNS_WIDE, SUM_WIDE, SUM_ROWS, SUM_WARPS = 32, 128, 8192, 64, 4


@dataclass(frozen=True)
class Config:
    """How the kernel is launched for rows of one width. `flat`: a thread has all rows of its columns."""

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
        """The registers a thread with which all programs of a multiprocessor run at once."""
        return min(MOST_REGISTERS, REGISTERS // (self.programs * self.warps * 32) // 8 * 8)


@cache
def tables() -> Tables:
    """Of entries [largest row in bytes, warps, rows, programs, stages]."""
    return load("backward_configs.json")


_forced: list[int] | None = None


@contextmanager
def forced(*entry: int) -> Iterator[None]:
    """One entry of a table for everything that is bound meanwhile; without one, the parts of rows beyond a table."""
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
    """The configuration that a table's entry stands for: the rest follows from the width."""
    power = 1 << (width - 1).bit_length()
    vectors = warps * 32 * VECTOR_BYTES // itemsize
    block = power if rows > 1 else min(power, vectors)
    chunks = -(-width // block)
    hold = block * rows * chunks <= HOLD_ELEMENTS * warps * 32
    flat = rows > 1 and block >= vectors
    return Config(warps, rows, block, chunks, 1, programs, stages, hold, flat)


def in_parts(table: str, width: int) -> Config:
    """The configuration of rows that no program holds."""
    block, rows = min(PART, 1 << (width - 1).bit_length()), PART_ROWS[table]
    return Config(PART_WARPS, rows, block, 1, -(-width // block), PART_PROGRAMS, PART_STAGES, True, flat=block >= PART)
