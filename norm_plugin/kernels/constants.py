"""The constants of a kernel: how a program holds its rows (a tile), and what it computes (a recipe).

Both are named tuples. Triton compiles a kernel for each combination of their fields. It can also write named tuples as
JSON, which it does for listeners of its compiler, such as vLLM's monitor.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple, TypeVar

import triton
import triton.language as tl

from norm_plugin.kernels import interpreted

Group = TypeVar("Group")


def constants(group: type[Group]) -> type[Group]:
    """Makes the fields of a named tuple constants in a kernel. Triton before 3.9 takes a bare number for a run-time
    value, but its interpreter needs bare numbers."""
    for place, name in enumerate(group._fields):  # type: ignore[attr-defined]
        bare = itemgetter(place)
        setattr(group, name, property(bare if interpreted() else partial(wrapped, bare)))
    return group


@triton.constexpr_function  # type: ignore[untyped-decorator]
def power_of_two(n: int) -> int:
    """The least power of two that is not below n. Triton's own will not do: vLLM replaces it by a function that no
    kernel can call."""
    return 1 << (int(n) - 1).bit_length()


def wrapped(bare: Callable[[Any], Any], group: Any) -> tl.constexpr:
    """A field of a group, as a constant of the compiler."""
    return tl.constexpr(bare(group))


@constants
class Tile(NamedTuple):
    """How a program holds `rows` rows of `n` columns: in `chunks` of `block` columns. The last `held` chunks stay in
    registers; the others are read twice, `unroll` at once. `with_row`: the weight is read with the row, not after its
    sum. `levels` and `align` come from the Layout of the rows. `pdl`: launched dependently. `late`: see configs."""

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
