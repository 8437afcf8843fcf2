"""RMSNorm of gated rows whose parts lie on several ranks, in plain PyTorch: the specification.

Each rank has some columns of every row. It sums the squares of its part. The caller adds up the sums of all ranks. Then
each rank normalizes its part with the sums of whole rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from norm_plugin.native.gated import gate, weighted
from norm_plugin.native.rms import reduce_rows, stored, wide
from norm_plugin.numerics import FP32, GATED_NUMERICS


def gated(x: Tensor, z: Tensor | None, numerics: str) -> Tensor:
    """x * silu(z), or x if there is no gate, in the wide dtype."""
    h = wide(x)
    return h if z is None else h * gate(z.to(h.dtype), "silu", GATED_NUMERICS[numerics])


def split_sums(x: Tensor, z: Tensor | None, numerics: str = FP32.name) -> Tensor:
    """The sum of the squares of each row of this part, [..., 1], in the wide dtype."""
    return reduce_rows(torch.sum, gated(x, z, numerics).pow(2)).contiguous()


def split_rmsnorm(
    x: Tensor,
    weight: Tensor | None,
    z: Tensor | None,
    sums: Tensor,
    full_width: int,
    eps: float = 1e-6,
    numerics: str = FP32.name,
) -> Tensor:
    """The norm of this part. `sums` are the sums of whole rows, which have `full_width` columns."""
    y = gated(x, z, numerics) * torch.rsqrt(sums / full_width + eps)
    return stored(weighted(y, weight, None, GATED_NUMERICS[numerics], x.dtype), x)
