"""Whether one implementation is further from the truth than another: the same rows, against the same oracle.

Rows are independent samples, so the difference of two errors, averaged over the rows, is normal around its true value,
and its spread is known from the rows themselves: it may be positive by chance. Where an output is narrower than fp32,
both are the rounded truth, except where fp32 arithmetic carries a value over a tie; up to what that arithmetic moves is
no difference.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from norm_plugin.accuracy import bounds, ulps

#: Standard errors that a mean over rows may be off by chance: one comparison in 30000 exceeds 4, and the tests make
#: a few hundred, of which another CPU rounds every one anew.
CHANCE = 4.0


def row_errors(actual: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, max) error of each row, in ulps of the row's largest value: no small element outweighs its row."""
    apart = (actual.double() - truth).abs() / ulps.size(truth.abs().amax(-1, keepdim=True), actual.dtype)
    return apart.mean(-1).flatten(), apart.amax(-1).flatten()


def allowed(difference: Tensor, dtype: torch.dtype) -> float:
    """How large the mean of a difference of two errors, a sample each, may be without one being worse."""
    by_chance = CHANCE * float(difference.std()) / math.sqrt(difference.numel())
    if dtype not in (torch.float16, torch.bfloat16):
        return by_chance
    return by_chance + float(bounds.ROUNDINGS * bounds.rounding(dtype) * 2.0 ** (ulps.FORMATS[dtype][0] + 1))
