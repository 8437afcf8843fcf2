"""Launch configurations: data, a function of (family, N, element size, GPU), never of the number of rows.

A row is held by `warps` warps in chunks of BLOCK columns, one 16-byte load a thread and chunk; a program takes `rows`
rows. The order of a row's sum follows from these alone, so a row's result cannot depend on the batch around it.
`late` says when the next kernel may start beside this one: after the row is read, or at once. `lean` is the number of
programs per multiprocessor from which on weights are read after the row, not before it, so that more programs fit (0:
never). Neither changes a bit, so the second may look at the batch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import resources

#: Wider rows than this, in bytes, do not fit the registers of one program: they are read again for the output.
RESIDENT_BYTES = 131072

#: How many chunks of a row that does not fit are read at once.
UNROLL = 4

#: The most elements a thread may hold for its weight to be read before the wait, beside the row itself.
PRELOAD_ELEMENTS = 32


@dataclass(frozen=True)
class Config:
    """How one kernel is launched for rows of one width."""

    warps: int
    rows: int
    block: int
    chunks: int
    resident: bool
    preload: bool
    late: bool
    lean: int


@cache
def tables() -> dict[str, dict[str, list[list[int]]]]:
    """GPU -> family -> [[largest row in bytes, warps, rows, late, lean], ...]; "default" for any other GPU."""
    found: dict[str, dict[str, list[list[int]]]] = json.loads(
        resources.files("norm_plugin.kernels").joinpath("configs.json").read_text()
    )
    return found


def config(family: str, width: int, itemsize: int, gpu: str) -> Config:
    """The configuration for rows of `width` elements of `itemsize` bytes."""
    table = [_forced] if _forced else tables().get(gpu, tables()["default"])[family]
    row_bytes = width * itemsize
    entry = next((entry for limit, *entry in table if row_bytes <= limit), table[-1][1:])
    return make(width, itemsize, *entry)


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


def make(width: int, itemsize: int, warps: int, rows: int, late: int, lean: int) -> Config:
    """The configuration that a table's entry stands for: the rest follows from the width."""
    power = 1 << (width - 1).bit_length()
    block = power if rows > 1 else min(power, warps * 32 * 16 // itemsize)
    chunks = -(-width // block)
    held = block * chunks * rows // (warps * 32)
    resident = width * itemsize <= RESIDENT_BYTES
    preload = resident and held <= PRELOAD_ELEMENTS
    return Config(warps, rows, block, chunks, resident, preload, bool(late), lean)
