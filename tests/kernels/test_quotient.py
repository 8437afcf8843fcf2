"""The division of the quantised outputs gives the bits of a division, by four instructions instead of a dozen."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from norm_plugin.kernels.common import quotient
from tests.kernels.device import COMPILED, DEVICE

COUNT = 1 << 22 if COMPILED else 1 << 14


@triton.jit
def divide_kernel(Y, BY, OUT, BLOCK: tl.constexpr, FP8_UNIT: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y, by = tl.load(Y + at), tl.load(BY + at)
    inverse = tl.div_rn(tl.full([BLOCK], 1.0, tl.float32), by)
    tl.store(OUT + at, quotient(y, inverse, by, FP8_UNIT))


@pytest.mark.parametrize("largest", [1.0, 448.0, 6e4, 3e38], ids=str)
def test_quotients_are_those_of_a_division(largest: float) -> None:
    """For the scales of rows of that magnitude (their largest element over 448), and elements up to it."""
    by = (torch.rand(COUNT, device=DEVICE) * (largest / 448)).clamp_min(1 / (448 * 512))
    y = (torch.rand(COUNT, device=DEVICE) * 2 - 1) * by * 448
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan")], device=DEVICE)
    y[: len(special)] = special
    by[len(special)] = float("inf")
    out = torch.empty_like(y)
    divide_kernel[(COUNT // 1024,)](y, by, out, BLOCK=1024, FP8_UNIT=True)
    expected = y / by
    tiny = expected.abs() < torch.finfo(torch.float32).tiny  # far below any fp8, so nothing is promised
    same = (out == expected) | (out.isnan() & expected.isnan()) | (tiny & (out.abs() < 1e-37))
    assert bool(same.all()), f"{int((~same).sum())} of {COUNT} differ"
