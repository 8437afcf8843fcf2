"""What a kernel knows when it is compiled: how its rows are laid out (a tile), and what it computes of them (a recipe).

Both are named tuples: Triton makes one kernel for each value of all their fields, and can write them as JSON, which it
does for whoever listens to its compiler (vLLM's monitor does).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple, TypeVar

import triton.language as tl

from norm_plugin.kernels import interpreted

Group = TypeVar("Group")


def constants(group: type[Group]) -> type[Group]:
    """A named tuple whose fields are constants in a kernel. Triton before 3.9 reads a bare number as a run-time value;
    the interpreter wants it bare."""
    for place, name in enumerate(group._fields):  # type: ignore[attr-defined]
        bare = itemgetter(place)
        setattr(group, name, property(bare if interpreted() else partial(wrapped, bare)))
    return group


def wrapped(bare: Callable[[Any], Any], group: Any) -> tl.constexpr:
    """A field of a group, as the compiler wants it."""
    return tl.constexpr(bare(group))


@constants
class Tile(NamedTuple):
    """How a program holds `rows` rows of `n` columns: in `chunks` of `block` columns, of which the last `held` stay in
    registers and the others are read twice, `unroll` at once. `with_row`: the weight is read with the row, not after
    its sum. `levels` and `align` are of the rows' Layout. `pdl`: launched dependently; `late`: see configs."""

    n: int
    block: int
    chunks: int
    unroll: int
    held: int
    with_row: bool
    rows: int
    levels: int
    align: int
    pdl: bool
    late: bool
