"""RMSNorm of rows whose parts lie on several ranks: two ops, and an all-reduce between them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from norm_plugin import ops
from norm_plugin.call import call
from norm_plugin.numerics import FP32

#: The ops of one call, in order.
OPS = (ops.SPLIT_SUMS, ops.SPLIT_RMSNORM)


def rmsnorm_of_part(
    x: Tensor,
    weight: Tensor | None,
    z: Tensor | None,
    eps: float,
    parts: int,
    all_reduce: Callable[[Tensor], Tensor],
    *,
    numerics: str = FP32.name,
) -> Tensor:
    """This rank's part of rmsnorm(x * silu(z)). x, z and weight are one of `parts` parts of equal width. `all_reduce`
    adds up the sums [..., 1] of all ranks."""
    sums = all_reduce(call(ops.SPLIT_SUMS, (x, z), (numerics,)))
    how = (parts * x.shape[-1], eps, numerics)
    result: Tensor = call(ops.SPLIT_RMSNORM, (x, weight, z, sums), how)
    return result
