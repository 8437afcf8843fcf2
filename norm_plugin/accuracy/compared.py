"""Whether one implementation is further from the truth than another, on the same rows with the same oracle.

Rows are independent samples. So the difference of two errors, averaged over the rows, is normal around its true value,
and the rows show its spread: by chance it may be positive. In an output narrower than fp32 both are the rounded truth,
except where fp32 arithmetic carries a value over a tie. So a difference that this arithmetic can make counts as none.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from norm_plugin.accuracy import bounds, ulps

#: The standard errors that a mean over rows may be off by chance. One comparison in 30000 exceeds 4. The tests make a
#: few hundred, and each CPU rounds them anew.
CHANCE = 4.0


def row_errors(actual: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, max) error of each row, in ulps of the row's largest value, so that no small element outweighs its row."""
    apart = (actual.double() - truth).abs() / ulps.size(truth.abs().amax(-1, keepdim=True), actual.dtype)
    return apart.mean(-1).flatten(), apart.amax(-1).flatten()


def allowed(difference: Tensor, dtype: torch.dtype) -> float:
    """The largest mean that a sample of differences of two errors may have, if neither error is worse."""
    by_chance = CHANCE * float(difference.std()) / math.sqrt(difference.numel())
    if dtype not in (torch.float16, torch.bfloat16):
        return by_chance
    return by_chance + float(bounds.ROUNDINGS * bounds.rounding(dtype) * 2.0 ** (ulps.FORMATS[dtype][0] + 1))
