"""Chooses points of a grid so that every two values of different axes meet.

The grids of the specification are full products: cheap for native ops, but too many kernels to compile or to interpret.
If two arguments do not work together, a pair of values shows it. So the kernels run only as many points as it takes for
every pair to occur. EVERY_KERNEL_TEST=1 runs all points.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import combinations

Point = dict[str, Hashable]


def pairs_of(point: Point) -> set[tuple[Hashable, ...]]:
    """All pairs of values that meet at a point."""
    return {(one, point[one], other, point[other]) for one, other in combinations(sorted(point), 2)}


def pairwise(points: Sequence[Point]) -> list[int]:
    """The places of points that together have every pair. Greedy: always takes the point with most new pairs."""
    left = {place: pairs_of(point) or {tuple(point.items())} for place, point in enumerate(points)}
    met: set[tuple[Hashable, ...]] = set()
    chosen = []
    while left:
        place = max(left, key=lambda p: len(left[p] - met))
        met |= left.pop(place)
        chosen.append(place)
        left = {p: pairs for p, pairs in left.items() if not pairs <= met}
    return sorted(chosen)
