"""Distances between a result and its fp64 oracle, in ulps of the dtype of the result."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

#: The digits after the leading one, and the exponents of the least normal and of the largest value.
FORMATS: dict[torch.dtype, tuple[int, int, int]] = {
    torch.float64: (52, -1022, 1023),
    torch.float32: (23, -126, 127),
    torch.bfloat16: (7, -126, 127),
    torch.float16: (10, -14, 15),
    torch.float8_e4m3fn: (3, -6, 8),
    torch.float8_e5m2: (2, -14, 15),
}


class Ulps(NamedTuple):
    """The largest and the mean distance. inf: the oracle has a NaN where the result has none, or the reverse."""

    max: float
    mean: float


def size(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between neighbours of `dtype` at the fp64 `value`; 1 for integers."""
    if not dtype.is_floating_point:
        return torch.ones_like(value)
    digits, least, largest = FORMATS[dtype]
    exponent = torch.frexp(value.nan_to_num())[1] - 1
    exponent = exponent.where(value != 0, least).clamp(least, largest)
    return torch.ldexp(torch.ones_like(value), exponent - digits)


def distance(actual: Tensor, oracle: Tensor) -> Tensor:
    """The distance of each element. Two NaNs are 0 apart. inf counts as the power of two after the largest value."""
    if actual.shape != oracle.shape:
        raise ValueError(f"actual has shape {list(actual.shape)} and the oracle {list(oracle.shape)}")
    values, truth = actual.double(), oracle.double()
    if actual.dtype.is_floating_point and actual.dtype != torch.float64:
        infinity = 2.0 ** (FORMATS[actual.dtype][2] + 1)
        values, truth = values.clamp(-infinity, infinity), truth.clamp(-infinity, infinity)
    apart = (values - truth).abs() / size(truth, actual.dtype)
    apart = apart.where(values != truth, 0.0)
    one_is_nan = values.isnan() != truth.isnan()
    return apart.where(~one_is_nan, float("inf")).where(~(values.isnan() & truth.isnan()), 0.0)


def nearest(actual: Tensor, *oracles: Tensor) -> Tensor:
    """The distance of each element to the nearest of the oracles."""
    apart = distance(actual, oracles[0])
    for oracle in oracles[1:]:
        apart = torch.minimum(apart, distance(actual, oracle))
    return apart


def measure(actual: Tensor, *oracles: Tensor) -> Ulps:
    """The distance to the nearest of the oracles: its maximum and its mean."""
    if actual.numel() == 0:
        return Ulps(0.0, 0.0)
    apart = nearest(actual, *oracles)
    return Ulps(float(apart.max()), float(apart.mean()))


def excess(actual: Tensor, bound: Tensor, *oracles: Tensor) -> float:
    """By how many ulps the worst element exceeds half an ulp plus its `bound` (an absolute amount). 0 is right."""
    if actual.numel() == 0:
        return 0.0
    allowed = 0.5 + (bound / size(oracles[0].double(), actual.dtype)).nan_to_num(0.0, posinf=0.0)
    return float((nearest(actual, *oracles) - allowed).clamp(min=0).max())
