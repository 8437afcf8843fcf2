"""Launch configurations: data, a function of (family, N, element size, GPU), never of the number of rows.

A row is held by `warps` warps in chunks of BLOCK columns, one 16-byte load a thread and chunk; a program takes `rows`
rows. The order of a row's sum follows from these alone, so a row's result cannot depend on the batch around it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources

#: Wider rows than this, in bytes, do not fit the registers of one program: they are read again for the output.
RESIDENT_BYTES = 131072

#: The most elements a thread may hold for its weight to be read before the wait, beside the row itself.
PRELOAD_ELEMENTS = 16


@dataclass(frozen=True)
class Config:
    """How one kernel is launched for rows of one width."""

    warps: int
    rows: int
    block: int
    chunks: int
    resident: bool
    preload: bool


@cache
def tables() -> dict[str, dict[str, list[list[int]]]]:
    """GPU -> family -> [[largest N in bytes, warps, rows], ...], ascending; "default" where a GPU has no table."""
    found: dict[str, dict[str, list[list[int]]]] = json.loads(
        resources.files("norm_plugin.kernels").joinpath("configs.json").read_text()
    )
    return found


@cache
def config(family: str, width: int, itemsize: int, gpu: str) -> Config:
    """The configuration for rows of `width` elements of `itemsize` bytes."""
    table = tables().get(gpu, tables()["default"])[family]
    row_bytes = width * itemsize
    warps, rows = next(((w, r) for limit, w, r in table if row_bytes <= limit), table[-1][1:])
    return make(width, itemsize, warps, rows)


def make(width: int, itemsize: int, warps: int, rows: int) -> Config:
    """The configuration that `warps` and `rows` stand for: the rest follows from the width."""
    power = 1 << (width - 1).bit_length()
    block = power if rows > 1 else min(power, warps * 32 * 16 // itemsize)
    chunks = -(-width // block)
    held = block * chunks * rows // (warps * 32)
    resident = width * itemsize <= RESIDENT_BYTES
    return Config(warps, rows, block, chunks, resident, resident and held <= PRELOAD_ELEMENTS)
