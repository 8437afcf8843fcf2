"""Launch configurations: data, a function of (table, N, element size, GPU), never of the number of rows.

A row is held by `warps` warps in chunks of BLOCK columns, one load of `vector` bytes a thread and chunk; a program has
`rows` rows. The order of a row's sum follows from these alone, so a row's result cannot depend on the batch around it.
`late` says when the next kernel may start beside this one: after the row is read, or at once. `lean` is the number of
programs per multiprocessor from which on weights are read after the row's sum, not with it, so that more programs fit
(0: never). Neither changes a bit, so the second may look at the batch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import resources

#: The bytes of a row that one program holds in registers; what is before them is read a second time for the output.
HELD_BYTES = 98304

#: How many of the chunks that are read twice are read at once.
UNROLL = 4

#: The most elements a thread may hold for its weight to be read with the row, and held beside it.
WITH_ROW_ELEMENTS = 32


@dataclass(frozen=True)
class Config:
    """How one kernel is launched for rows of one width."""

    warps: int
    rows: int
    block: int
    chunks: int
    held: int
    with_row: bool
    late: bool
    lean: int


#: GPU -> table -> entries, of which the first number is the largest row in bytes; "default" is any other GPU.
Tables = dict[str, dict[str, list[list[int]]]]


def load(name: str) -> Tables:
    """The tables of a file beside this one."""
    found: Tables = json.loads(resources.files("norm_plugin.kernels").joinpath(name).read_text())
    return found


@cache
def tables() -> Tables:
    """Of entries [largest row in bytes, warps, rows, late, lean, vector]."""
    return load("configs.json")


def config(table: str, width: int, itemsize: int, gpu: str) -> Config:
    """The configuration for rows of `width` elements of `itemsize` bytes."""
    known = [_forced] if _forced else entries(tables(), gpu, table)
    row_bytes = width * itemsize
    entry = next((entry for limit, *entry in known if row_bytes <= limit), known[-1][1:])
    return make(table, width, itemsize, *entry)


def entries(of: Tables, gpu: str, table: str) -> list[list[int]]:
    """A GPU's entries of a table, or those of any other GPU."""
    return of.get(gpu, {}).get(table) or of["default"][table]


_forced: list[int] | None = None


@contextmanager
def forced(*entry: int) -> Iterator[None]:
    """One entry of a table for everything that is bound meanwhile: for whoever measures them."""
    global _forced
    _forced = [0, *entry]
    try:
        yield
    finally:
        _forced = None


def make(
    table: str, width: int, itemsize: int, warps: int, rows: int, late: int, lean: int, vector: int = 16
) -> Config:  # fmt: skip
    """The configuration that a table's entry stands for: the rest follows from the width."""
    power = 1 << (width - 1).bit_length()
    block = power if rows > 1 else min(power, warps * 32 * max(1, vector // itemsize))
    chunks = -(-width // block)
    room = HELD_BYTES // (block * rows * bytes_held(table, itemsize))
    held = min(chunks, max(1, room))
    with_row = held == chunks and block * rows * chunks <= WITH_ROW_ELEMENTS * warps * 32
    return Config(warps, rows, block, chunks, held, with_row, bool(late), lean)


def bytes_held(table: str, itemsize: int) -> int:
    """Register bytes an element: a row as it is, with its gate, or the fp32 sum of a row and its residual."""
    return {"add": 4, "gated": 2 * itemsize}.get(table, itemsize)
