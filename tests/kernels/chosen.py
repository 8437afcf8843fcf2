"""Which tests run on the kernels: of those of the specification a part, and none where there is no place for them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

import pytest

from norm_plugin.numerics import GATED_NUMERICS, NUMERICS
from tests.kernels.device import why_not
from tests.kernels.pairwise import pairwise


def skip_without_kernels(items: Iterable[pytest.Item]) -> None:
    """Skip what needs a GPU or the interpreter where there is neither."""
    for item in items:
        if item.get_closest_marker("without_kernels") is None and (reason := why_not()):
            item.add_marker(pytest.mark.skip(reason=reason))


def of_the_specification(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """The tests that take a backend, in numerics that a kernel computes; of each grid as many points as it takes for
    every pair of values to meet, or all of them with EVERY_KERNEL_TEST=1."""
    asked = [item for item in items if "backend" in item.fixturenames and not of_torch_functions(item)]
    if os.environ.get("EVERY_KERNEL_TEST") == "1":
        return asked
    grids: dict[object, list[pytest.Item]] = {}
    for item in asked:
        grids.setdefault((item.path, item.function), []).append(item)
    kept: set[pytest.Item] = set()
    for grid in grids.values():
        points = [{name: str(value) for name, value in parameters(item).items()} for item in grid]
        kept |= {grid[place] for place in pairwise(points)}
    return [item for item in asked if item in kept]


def of_torch_functions(item: pytest.Item) -> bool:
    """Whether it is in numerics of PyTorch's own functions, which no kernel computes; test_refusals.py shows that."""
    numerics = parameters(item).get("numerics")
    known = NUMERICS | GATED_NUMERICS
    return numerics in known and known[str(numerics)].torch_functions


def parameters(item: pytest.Item) -> dict[str, object]:
    """What a test of a grid was made with, but for the backend, which all of them share."""
    return {name: value for name, value in item.callspec.params.items() if name != "backend"}
