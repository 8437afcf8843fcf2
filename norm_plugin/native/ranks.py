"""Norms of a sum over ranks, in plain PyTorch: the specification.

Every rank gathers all parts, adds them up in fp32 in the order of the ranks, and rounds once. So every rank has the
same sum, whatever the number of rows; the rest is the native op of one rank.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from norm_plugin import groups
from norm_plugin.native.rms import add_rmsnorm, rmsnorm, wide, wide_dtype
from norm_plugin.numerics import FP32


def allreduce(input: Tensor, group: str) -> Tensor:
    """The sum of `input` over ranks 0, 1, 2 and so on, rounded once. Zero is +0, whatever the signs of its parts."""
    process_group = groups.find(group)
    part = input.contiguous()
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size(process_group))]
    dist.all_gather([p.view(torch.uint8) for p in parts], part.view(torch.uint8), group=process_group)
    total = torch.zeros(part.shape, dtype=wide_dtype(part.dtype), device=part.device)
    for p in parts:
        total += wide(p)
    return total.to(part.dtype) + 0.0


def allreduce_rmsnorm(
    input: Tensor,
    weight: Tensor | None,
    group: str,
    eps: float = 1e-6,
    numerics: str = FP32.name,
    gemma: bool = False,
    enable_pdl: bool | None = None,
) -> Tensor:
    """rmsnorm(the sum of input over ranks)."""
    return rmsnorm(allreduce(input, group), weight, eps, numerics, gemma)


def allreduce_add_rmsnorm(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    group: str,
    eps: float = 1e-6,
    numerics: str = FP32.name,
    gemma: bool = False,
    enable_pdl: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """(norm(sum + residual), sum + residual) of the sum of input over ranks."""
    return add_rmsnorm(allreduce(input, group), residual, weight, eps, numerics, gemma)


def allreduce_norm_add_norm(
    input: Tensor,
    residual: Tensor,
    post_weight: Tensor,
    weight: Tensor | None,
    group: str,
    eps: float = 1e-6,
    numerics: str = FP32.name,
    gemma: bool = False,
    enable_pdl: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """(norm(post + residual), post + residual), where post is the norm of the sum of input over ranks: the end of one
    block and the begin of the next, where a block normalizes its output too (Gemma 2 and later)."""
    post = rmsnorm(allreduce(input, group), post_weight, eps, numerics, gemma)
    return add_rmsnorm(post, residual, weight, eps, numerics, gemma)
