"""One call of each table on its own buffers, for whoever times them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import norm_plugin

DTYPE = torch.bfloat16
FP8 = torch.float8_e4m3fn


def normal(*shape: int) -> Tensor:
    """Random values: zeros run faster than data do."""
    return torch.randn(*shape, device="cuda", dtype=DTYPE)


def rms(rows: int, width: int) -> Callable[[], object]:
    x, w = normal(rows, width), normal(width)
    out = torch.empty_like(x)
    return lambda: norm_plugin.rmsnorm(x, w, 1e-6, out)


def add(rows: int, width: int) -> Callable[[], object]:
    x, r, w = normal(rows, width), normal(rows, width), normal(width)
    return lambda: norm_plugin.fused_add_rmsnorm(x, r, w)


def layer(rows: int, width: int) -> Callable[[], object]:
    x, w, b = normal(rows, width), normal(width), normal(width)
    return lambda: norm_plugin.layernorm(x, w, b)


def gated(rows: int, width: int) -> Callable[[], object]:
    x, z, w = normal(rows, width), normal(rows, width), normal(width)
    return lambda: norm_plugin.rmsnorm_fn(x, w, None, z)


def static(rows: int, width: int) -> Callable[[], object]:
    x, w = normal(rows, width), normal(width)
    out, scale = torch.empty_like(x, dtype=FP8), torch.full((1,), 0.02, device="cuda")
    return lambda: norm_plugin.rmsnorm_quant(out, x, w, scale)


def token(rows: int, width: int) -> Callable[[], object]:
    x, w = normal(rows, width), normal(width)
    return lambda: norm_plugin.rmsnorm_dynamic_quant(x, w)


def block(rows: int, width: int) -> Callable[[], object]:
    x, w = normal(rows, width), normal(width)
    return lambda: norm_plugin.rmsnorm_block_quant(x, w, group_size=128 if width % 128 == 0 else 64)


#: Family of configurations -> what is timed for it, and how often it moves a row through memory.
CALLS: dict[str, tuple[Callable[[int, int], Callable[[], object]], float]] = {
    "rms": (rms, 2),
    "add": (add, 4),
    "layer": (layer, 2),
    "gated": (gated, 3),
    "static": (static, 1.5),
    "token": (token, 1.5),
    "block": (block, 1.5),
}
