"""The tensors of an op at one size, and calls of functions whose parameters are named after them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from norm_plugin.bench.grid import QKV_HEADS, Point
from norm_plugin.bench.timing import Call

EPS = 1e-6
DTYPE = torch.bfloat16
FP8 = torch.float8_e4m3fn

#: Its parameters are named after the Buffers that it gets; one with a default keeps that. Where it returns nothing, its
#: result is what it wrote.
Function = Callable[..., Any]
WRITTEN = ("out", "out8", "x_copy", "scale", "token_scales", "block_scales", "r_copy")


class Buffers:
    """One set of tensors for a point, each made when it is first asked for. Random: zeros run faster than data do."""

    def __init__(self, point: Point, device: str = "cuda") -> None:
        self.point, self.device, self.group = point, device, point.group
        self.block = 128 if point.width % 128 == 0 else 64

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=DTYPE)

    def as_x(self) -> Tensor:
        return self.normal(*self.x.shape)

    def as_row(self) -> Tensor:
        return self.normal(self.point.width)

    @cached_property
    def x(self) -> Tensor:
        p = self.point
        if p.op != "qk":
            return self.normal(p.rows, p.width)
        q, k = QKV_HEADS
        start = 0 if p.heads == q else q * p.width
        qkv = self.normal(p.rows, (q + 2 * k) * p.width)
        return qkv[:, start : start + p.heads * p.width].view(p.rows, p.heads, p.width)

    r, z = cached_property(as_x), cached_property(as_x)  # the residual and the gate
    dy, dr = cached_property(as_x), cached_property(as_x)  # the gradients of the output and of the sum beside it
    w, b = cached_property(as_row), cached_property(as_row)

    @cached_property
    def w32(self) -> Tensor:
        return self.w.float()

    @cached_property
    def b32(self) -> Tensor:
        return self.b.float()

    @cached_property
    def head_weights(self) -> Tensor:
        return self.w.expand(self.point.heads, -1).contiguous()

    @cached_property
    def scale(self) -> Tensor:
        return torch.full((1,), 0.02, device=self.device)

    # What is written is a new tensor for each contender: nobody reads what another has written.

    @property
    def x_copy(self) -> Tensor:
        return self.x.clone()

    @property
    def r_copy(self) -> Tensor:
        return self.r.clone()

    @property
    def out(self) -> Tensor:
        return torch.empty(self.x.shape, device=self.device, dtype=DTYPE)

    @property
    def out8(self) -> Tensor:
        return torch.empty(self.x.shape, device=self.device, dtype=FP8)

    @property
    def token_scales(self) -> Tensor:
        return torch.empty(self.point.rows, 1, device=self.device)

    @property
    def block_scales(self) -> Tensor:
        return torch.empty(self.point.rows, self.point.width // self.block, device=self.device)

    def taken(self, f: Function) -> dict[str, Any]:
        """What f gets, by name."""
        return {p.name: getattr(self, p.name) for p in signature(f).parameters.values() if p.default is p.empty}

    def call(self, f: Function) -> Call:
        """A call of f on these buffers."""
        taken = self.taken(f)
        arguments, written = tuple(taken.values()), tuple(taken[name] for name in WRITTEN if name in taken)

        def call() -> object:
            result = f(*arguments)
            return written if result is None else result

        return call
