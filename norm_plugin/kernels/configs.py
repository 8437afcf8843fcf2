"""Launch configurations: data, a function of (table, N, element size, GPU), never of the number of rows.

A program has `rows` rows. `warps` warps hold a row in chunks of BLOCK columns, one load of `vector` bytes for each
thread and chunk. These alone decide the order of a row's sum, so a row's result cannot depend on the batch around it.

`late` says when the next kernel may start beside this one: after the row is read, or at once. `lean` is for large
batches: from that many programs per multiprocessor on, weights are read after the row's sum, not with the row, so that
more programs fit (0: never). Neither changes a bit, so `lean` may depend on the batch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import resources

#: The bytes of a row that one program holds in registers. The part before them is read again for the output.
HELD_BYTES = 98304

#: Of the chunks that are read twice, so many are read at once.
UNROLL = 4

#: A weight is read with the row, and held beside it, if a thread holds at most so many elements.
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


#: GPU -> table -> entries. The first number of an entry is the largest row in bytes. "default" is any other GPU.
Tables = dict[str, dict[str, list[list[int]]]]


def load(name: str) -> Tables:
    """The tables in a file beside this one."""
    found: Tables = json.loads(resources.files("norm_plugin.kernels").joinpath(name).read_text())
    return found


@cache
def tables() -> Tables:
    """Their entries are [largest row in bytes, warps, rows, late, lean, vector]."""
    return load("configs.json")


def config(table: str, width: int, itemsize: int, gpu: str) -> Config:
    """The configuration for rows of `width` elements of `itemsize` bytes."""
    known = [_forced] if _forced else entries(tables(), gpu, table)
    row_bytes = width * itemsize
    entry = next((entry for limit, *entry in known if row_bytes <= limit), known[-1][1:])
    return make(table, width, itemsize, *entry)


def entries(of: Tables, gpu: str, table: str) -> list[list[int]]:
    """The entries of a table for a GPU, or the default ones."""
    return of.get(gpu, {}).get(table) or of["default"][table]


_forced: list[int] | None = None


@contextmanager
def forced(*entry: int) -> Iterator[None]:
    """Binds all launches in the block with one entry of a table, to measure it."""
    global _forced
    _forced = [0, *entry]
    try:
        yield
    finally:
        _forced = None


def make(
    table: str, width: int, itemsize: int, warps: int, rows: int, late: int, lean: int, vector: int = 16
) -> Config:  # fmt: skip
    """The configuration of a table's entry: the rest of it follows from the width."""
    power = 1 << (width - 1).bit_length()
    block = power if rows > 1 else min(power, warps * 32 * max(1, vector // itemsize))
    chunks = -(-width // block)
    room = HELD_BYTES // (block * rows * bytes_held(table, itemsize))
    held = min(chunks, max(1, room))
    with_row = held == chunks and block * rows * chunks <= WITH_ROW_ELEMENTS * warps * 32
    return Config(warps, rows, block, chunks, held, with_row, bool(late), lean)


def bytes_held(table: str, itemsize: int) -> int:
    """The register bytes of an element: of x, of x and its gate, or of the fp32 sum of x and a residual."""
    return {"add": 4, "gated": 2 * itemsize}.get(table, itemsize)
