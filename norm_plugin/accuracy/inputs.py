"""The inputs that a norm is judged on: classes of values. Every one is made from a seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Shape = Sequence[int]

OUTLIER_EVERY = 512
OUTLIER_SCALE = 40.0
FP16_LARGEST = 65504.0
NEAR_FP32_LEAST = 1e-38


def randn(shape: Shape, seed: int) -> Tensor:
    """Normal values in fp32, drawn on the CPU so that every device gets the same."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def outliers(shape: Shape, seed: int) -> Tensor:
    """Normal values. A few channels are much larger in every row, as in language models."""
    x: Tensor = randn(shape, seed)
    x[..., ::OUTLIER_EVERY] *= OUTLIER_SCALE
    return x


def row_scales(shape: Shape, seed: int) -> Tensor:
    """Normal rows, each with its own magnitude from 2^-8 to 2^8."""
    exponents = randn([*shape[:-1], 1], seed + 1).mul(4).round().clamp(-8, 8)
    return randn(shape, seed) * exponents.exp2()


def large_mean(shape: Shape, seed: int) -> Tensor:
    """Normal values around 100. A variance computed as E[x^2] - E[x]^2 loses its digits here."""
    return randn(shape, seed) + 100


def constant_rows(shape: Shape, seed: int) -> Tensor:
    """Rows without variance."""
    return randn([*shape[:-1], 1], seed).expand(*shape).clone()


def zeros(shape: Shape, seed: int) -> Tensor:
    """Normal rows; every second one, from the first on, is zero."""
    x = randn(shape, seed)
    x.view(-1, x.shape[-1])[::2] = 0
    return x


def largest(shape: Shape, seed: int) -> Tensor:
    """The largest magnitude of fp16, with random signs."""
    return randn(shape, seed).sign() * FP16_LARGEST


def tiny(shape: Shape, seed: int) -> Tensor:
    """Values whose squares underflow in fp32, so that only eps is left."""
    return randn(shape, seed) * NEAR_FP32_LEAST


#: Classes whose result is finite in every row.
FINITE: dict[str, Callable[[Shape, int], Tensor]] = {
    "normal": randn,
    "outliers": outliers,
    "row_scales": row_scales,
    "large_mean": large_mean,
    "constant_rows": constant_rows,
    "zeros": zeros,
    "largest": largest,
    "tiny": tiny,
}


def inf_row(shape: Shape, seed: int) -> Tensor:
    """One inf, in the middle row."""
    return _spoiled(shape, seed, float("inf"))


def nan_row(shape: Shape, seed: int) -> Tensor:
    """One NaN, in the middle row."""
    return _spoiled(shape, seed, float("nan"))


def _spoiled(shape: Shape, seed: int, value: float) -> Tensor:
    x = randn(shape, seed)
    rows = x.view(-1, x.shape[-1])
    rows[spoiled_row(shape), x.shape[-1] // 2] = value
    return x


def spoiled_row(shape: Shape) -> int:
    """The row that inf_row and nan_row spoil."""
    return math.prod(shape[:-1]) // 2


#: Classes with one row that is not finite.
SPOILED: dict[str, Callable[[Shape, int], Tensor]] = {"inf_row": inf_row, "nan_row": nan_row}

CLASSES = FINITE | SPOILED


def make(
    name: str, shape: Shape, dtype: torch.dtype = torch.float32, seed: int = 0, device: torch.device | str = "cpu"
) -> Tensor:
    """A contiguous tensor of an input class. Values that overflow the dtype saturate; inf and NaN stay."""
    x = CLASSES[name](shape, seed).double()
    largest_finite = torch.finfo(dtype).max
    return torch.where(x.isinf(), x, x.clamp(-largest_finite, largest_finite)).to(dtype).to(device)


def weights(
    width: int, dtype: torch.dtype = torch.float32, seed: int = 1000, device: torch.device | str = "cpu"
) -> Tensor:
    """A weight around one, as in trained norms."""
    return (1 + 0.25 * randn([width], seed)).to(dtype).to(device)


def biases(
    width: int, dtype: torch.dtype = torch.float32, seed: int = 2000, device: torch.device | str = "cpu"
) -> Tensor:
    """A bias around zero."""
    return (0.25 * randn([width], seed)).to(dtype).to(device)
