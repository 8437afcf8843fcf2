"""The kernel's protocol: real processes on shared memory, in Triton's interpreter, which meet in random orders."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ranks.processes import together


@pytest.mark.parametrize(("size", "seed", "calls"), [(2, 1, 40), (3, 3, 10), (4, 4, 8)])
def test_random_calls_are_those_of_the_twin(size: int, seed: int, calls: int, tmp_path: Path) -> None:
    """Sums, residuals and norms, by one shot and by two, with other lanes, in widths and dtypes that change."""
    together(size, tmp_path, "-m", "tests.ranks.child", str(seed), str(calls), TRITON_INTERPRET="1")
