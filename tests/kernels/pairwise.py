"""A part of a grid in which every two values of different axes meet.

The grids of the specification are full products: cheap for native ops, too many kernels to compile or to interpret. Two
arguments that do not go together show in a pair of values, so the kernels take as many points of the same grid as it
takes for every pair to occur. EVERY_KERNEL_TEST=1 takes all of them.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import combinations

Point = dict[str, Hashable]


def pairs_of(point: Point) -> set[tuple[Hashable, ...]]:
    """All pairs of values that meet at a point."""
    return {(one, point[one], other, point[other]) for one, other in combinations(sorted(point), 2)}


def pairwise(points: Sequence[Point]) -> list[int]:
    """Places of points that together have every pair, in their order; greedy: always the one with most new pairs."""
    left = {place: pairs_of(point) or {tuple(point.items())} for place, point in enumerate(points)}
    met: set[tuple[Hashable, ...]] = set()
    chosen = []
    while left:
        place = max(left, key=lambda p: len(left[p] - met))
        met |= left.pop(place)
        chosen.append(place)
        left = {p: pairs for p, pairs in left.items() if not pairs <= met}
    return sorted(chosen)
