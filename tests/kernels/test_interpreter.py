"""The repaired interpreter rounds as GPUs do. No other error of it is known.

The grid: fp32 values of every class of input, and values on ties, next to ties and beyond the largest value.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from norm_plugin.accuracy import inputs
from tests.kernels.device import INTERPRETED
from tests.kernels.twins import same_bits

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="the kernels are compiled here")

NARROW = [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]
LARGEST = {dtype: torch.finfo(dtype).max for dtype in NARROW}


def values(dtype: torch.dtype) -> Tensor:
    """fp32 values of all classes, within the range of a dtype, and a NaN."""
    found = [inputs.make(name, (16, 64)).flatten() for name in inputs.FINITE]
    steps = torch.arange(-1024, 1024) / 64  # in a format with few digits, most are ties
    around = [steps * 2.0**exponent * (1 + nudge) for exponent in (-20, -9, -6, 0, 3) for nudge in (-1e-7, 0, 1e-7)]
    every = torch.cat([*found, *around]).clamp(-LARGEST[dtype], LARGEST[dtype])
    every[0] = float("nan")
    return torch.cat([every, every.new_zeros(-len(every) % 1024)])


def stored(x: Tensor, dtype: torch.dtype, *, cast: bool) -> Tensor:
    """x as a kernel stores it: cast before the store, or by the store."""
    import triton

    from tests.kernels.copying import copy_kernel

    y = torch.empty_like(x, dtype=dtype)
    copy_kernel[(triton.cdiv(len(x), 1024),)](x, y, CAST=cast, BLOCK=1024)
    return y


@pytest.mark.parametrize("cast", [True, False], ids=["cast", "store"])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_fp32_rounds_to_nearest_even(dtype: torch.dtype, cast: bool) -> None:
    x = values(dtype)
    assert same_bits(stored(x, dtype, cast=cast), x.to(dtype))


def test_ties_go_to_even() -> None:
    """1 + 2^-8 lies between the bf16 numbers 1 and 1 + 2^-7, 1 + 3 * 2^-8 between 1 + 2^-7 and 1 + 2^-6."""
    x = torch.zeros(1024)
    x[:2] = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8])
    assert stored(x, torch.bfloat16, cast=True)[:2].tolist() == [1.0, 1 + 2.0**-6]


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_every_narrow_value_widens_exactly(dtype: torch.dtype) -> None:
    count = 2 ** (8 * dtype.itemsize)
    bits = torch.arange(max(count, 1024)) % count
    x = bits.to(torch.uint8 if dtype.itemsize == 1 else torch.uint16).view(dtype)
    assert same_bits(stored(x, torch.float32, cast=True), x.float())
