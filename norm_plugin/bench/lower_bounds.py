"""Lower bounds of a kernel's time: an empty kernel's, and that of a plain copy of as many bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from norm_plugin.bench.buffers import DTYPE
from norm_plugin.bench.lower_bound_kernels import copy_kernel, empty_kernel
from norm_plugin.bench.timing import Call, Time, graph_time
from norm_plugin.kernels.launch import has_pdl

COPY_BLOCKS = ((1024, 4), (2048, 4), (2048, 8), (4096, 8), (8192, 8), (8192, 16), (16384, 16), (16384, 32))
COPY_BUFFERS = 3
COPY_LAUNCHES = 9
COPY_REPLAYS = 15


@dataclass(frozen=True)
class Copy:
    """The fastest plain copy that moves `traffic` bytes, half of them reads."""

    traffic: int
    variant: str
    median: float
    spread: float


def pdl_options() -> dict[str, bool]:
    return {"launch_pdl": True} if has_pdl(torch.device("cuda", torch.cuda.current_device())) else {}


def floor() -> Time:
    """The time of a kernel that does nothing."""
    x, options = torch.empty(16, device="cuda", dtype=DTYPE), pdl_options()
    return graph_time([lambda: empty_kernel[(1,)](x, PDL=bool(options), num_warps=4, **options)], launches=256)


def triton_copy(x: Tensor, y: Tensor, block: int, warps: int, options: dict[str, bool]) -> Call:
    grid = (x.numel() // block,)
    return lambda: copy_kernel[grid](x, y, BLOCK=block, PDL=bool(options), num_warps=warps, **options)


def copies(pairs: list[tuple[Tensor, Tensor]]) -> Iterator[tuple[str, list[Call]]]:
    """Every variant of a copy, on these pairs of buffers."""
    yield "torch copy_", [partial(y.copy_, x) for x, y in pairs]
    options = pdl_options()
    for block, warps in COPY_BLOCKS:
        calls = [triton_copy(x, y, block, warps, options) for x, y in pairs]
        yield f"Triton, blocks of {block}, {warps} warps", calls


def best_copy(traffic: int) -> Copy:
    """The fastest of the variants, over buffers that together are larger than the L2."""
    step = max(block for block, _ in COPY_BLOCKS)
    size = -(-traffic // 2 // DTYPE.itemsize // step) * step
    pairs = []
    for _ in range(COPY_BUFFERS):
        x = torch.randn(size, device="cuda", dtype=DTYPE)
        pairs.append((x, torch.empty_like(x)))
    found = []
    for name, calls in copies(pairs):
        time = graph_time(calls, COPY_REPLAYS, COPY_LAUNCHES)
        found.append(Copy(traffic, name, time.median, time.spread))
    return min(found, key=lambda copy: copy.median)
