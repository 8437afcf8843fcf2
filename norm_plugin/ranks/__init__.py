"""Norms across ranks: all-reduce, residual add and norm in one, in a fixed order.

    ranks.prepare(group, width=4096, dtype=torch.bfloat16, device=device)      # on every rank, before any capture
    out, residual = ranks.allreduce_add_rmsnorm(part, residual, weight, group)

Every rank must make the same calls in the same order, as with any collective. All of them get the same bits, which
depend neither on the number of rows nor on the calls before.
"""

from __future__ import annotations

from torch import Tensor
from torch.distributed import ProcessGroup

from norm_plugin.call import call
from norm_plugin.numerics import FP32
from norm_plugin.ranks import ops
from norm_plugin.ranks.workspace import Workspace as Workspace
from norm_plugin.ranks.workspace import free as free
from norm_plugin.ranks.workspace import prepare as prepare


def allreduce_rmsnorm(
    input: Tensor,
    weight: Tensor | None,
    group: ProcessGroup,
    eps: float = 1e-6,
    enable_pdl: bool | None = None,
    *,
    numerics: str = FP32.name,
    gemma: bool = False,
) -> Tensor:
    """rmsnorm(the sum of input over ranks)."""
    how = (group.group_name, eps, numerics, gemma, enable_pdl)
    result: Tensor = call(ops.ALLREDUCE_RMSNORM, (input, weight), how)
    return result


def allreduce_add_rmsnorm(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    group: ProcessGroup,
    eps: float = 1e-6,
    enable_pdl: bool | None = None,
    *,
    numerics: str = FP32.name,
    gemma: bool = False,
) -> tuple[Tensor, Tensor]:
    """(rmsnorm(sum + residual), sum + residual) of the sum of input over ranks."""
    how = (group.group_name, eps, numerics, gemma, enable_pdl)
    result: tuple[Tensor, Tensor] = call(ops.ALLREDUCE_ADD_RMSNORM, (input, residual, weight), how)
    return result


def allreduce_norm_add_norm(
    input: Tensor,
    residual: Tensor,
    post_weight: Tensor,
    weight: Tensor | None,
    group: ProcessGroup,
    eps: float = 1e-6,
    enable_pdl: bool | None = None,
    *,
    numerics: str = FP32.name,
    gemma: bool = False,
) -> tuple[Tensor, Tensor]:
    """(rmsnorm(post + residual), post + residual), where post is rmsnorm(the sum of input over ranks, post_weight)."""
    how = (group.group_name, eps, numerics, gemma, enable_pdl)
    tensors = (input, residual, post_weight, weight)
    result: tuple[Tensor, Tensor] = call(ops.ALLREDUCE_NORM_ADD_NORM, tensors, how)
    return result
