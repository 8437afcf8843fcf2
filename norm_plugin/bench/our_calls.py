"""For each op: the buffers it works on, our call, and the plain formula that torch.compile gets."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

import norm_plugin
from norm_plugin.bench.grid import QKV_HEADS, Point
from norm_plugin.bench.timing import Call

EPS = 1e-6
DTYPE = torch.bfloat16
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
BLOCK = 128


class Buffers:
    """One set of tensors for a point, each made when it is first asked for. Random: zeros run faster than data do."""

    def __init__(self, point: Point, device: str = "cuda") -> None:
        self.point, self.device = point, device

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=DTYPE)

    @cached_property
    def x(self) -> Tensor:
        p = self.point
        if p.op != "qk":
            return self.normal(p.rows, p.width)
        q, k = QKV_HEADS
        start = 0 if p.heads == q else q * p.width
        qkv = self.normal(p.rows, (q + 2 * k) * p.width)
        return qkv[:, start : start + p.heads * p.width].view(p.rows, p.heads, p.width)

    @cached_property
    def r(self) -> Tensor:
        return self.normal(*self.x.shape)

    @cached_property
    def z(self) -> Tensor:
        return self.normal(*self.x.shape)

    @cached_property
    def dy(self) -> Tensor:
        """The gradient of the output, and `dr` that of the sum beside it."""
        return self.normal(*self.x.shape)

    @cached_property
    def dr(self) -> Tensor:
        return self.normal(*self.x.shape)

    @cached_property
    def w(self) -> Tensor:
        return self.normal(self.point.width)

    @cached_property
    def b(self) -> Tensor:
        return self.normal(self.point.width)

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

    @property
    def out(self) -> Tensor:
        """A new one for each contender: nobody reads what another has written."""
        return torch.empty(self.x.shape, device=self.device, dtype=DTYPE)

    @property
    def out8(self) -> Tensor:
        return torch.empty(self.x.shape, device=self.device, dtype=FP8)

    def scales(self, columns: int) -> Tensor:
        return torch.empty(self.point.rows, columns, device=self.device)


Make = Callable[[Buffers], Call]


def in_place_add(f: Callable[..., Any], *rest: Any) -> Make:
    """f(x, r, w, eps, *rest), which adds to r and writes the norm to x: on copies of their own."""

    def make(s: Buffers) -> Call:
        x, r, w = s.x.clone(), s.r.clone(), s.w
        return lambda: f(x, r, w, EPS, *rest) or (x, r)

    return make


def into_out(f: Callable[..., Any], *rest: Any) -> Make:
    """f(x, w, eps, out, *rest), which returns out."""

    def make(s: Buffers) -> Call:
        x, w, out = s.x, s.w, s.out
        return lambda: f(x, w, EPS, out, *rest)

    return make


def static_quant(f: Callable[..., Any], *rest: Any) -> Make:
    """f(out, x, w, scale, eps, *rest)."""

    def make(s: Buffers) -> Call:
        x, w, out, scale = s.x, s.w, s.out8, s.scale
        return lambda: f(out, x, w, scale, EPS, *rest) or (out, scale)

    return make


def static_quant_add(f: Callable[..., Any], *rest: Any) -> Make:
    """f(out, x, r, w, scale, eps, *rest), which adds to r."""

    def make(s: Buffers) -> Call:
        x, r, w, out, scale = s.x, s.r.clone(), s.w, s.out8, s.scale
        return lambda: f(out, x, r, w, scale, EPS, *rest) or (out, scale)

    return make


def _layer(s: Buffers) -> Call:
    x, w, b = s.x, s.w, s.b
    return lambda: norm_plugin.layernorm(x, w, b, EPS)


def _gated(s: Buffers) -> Call:
    x, w, z, group, before = s.x, s.w, s.z, s.point.group, s.point.op == "gated"
    return lambda: norm_plugin.rmsnorm_fn(x, w, None, z, EPS, group, before)


def _l2(s: Buffers) -> Call:
    x = s.x
    return lambda: norm_plugin.l2norm(x, EPS)


def _token_quant(s: Buffers) -> Call:
    x, w = s.x, s.w
    return lambda: norm_plugin.rmsnorm_dynamic_quant(x, w, None, EPS)


def _block_quant(s: Buffers) -> Call:
    x, w = s.x, s.w
    return lambda: norm_plugin.rmsnorm_block_quant(x, w, None, EPS, BLOCK)


_rms = into_out(norm_plugin.rmsnorm)
_add = in_place_add(norm_plugin.fused_add_rmsnorm)

OURS: dict[str, Make] = {
    "rms": _rms,
    "add": _add,
    "gemma": into_out(norm_plugin.gemma_rmsnorm),
    "gemma_add": in_place_add(norm_plugin.gemma_fused_add_rmsnorm),
    "layer": _layer,
    "gated": _gated,
    "gate_first": _gated,
    "groups": _gated,
    "qk": _rms,
    "l2": _l2,
    "static_quant": static_quant(norm_plugin.rmsnorm_quant),
    "static_quant_add": static_quant_add(norm_plugin.fused_add_rmsnorm_quant),
    "token_quant": _token_quant,
    "block_quant": _block_quant,
}

#: The same norm with an output that is not quantised: what a fused quantisation is held against.
ALONE = {"static_quant": _rms, "static_quant_add": _add, "token_quant": _rms, "block_quant": _rms}


def _normalized(h: Tensor) -> Tensor:
    return h * torch.rsqrt(h.square().mean(-1, keepdim=True) + EPS)


def _plain_rms(x: Tensor, w: Tensor) -> Tensor:
    return (_normalized(x.float()) * w.float()).to(x.dtype)


def _plain_gemma(x: Tensor, w: Tensor) -> Tensor:
    return (_normalized(x.float()) * (1 + w.float())).to(x.dtype)


def _plain_add(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    h = x.float() + r.float()
    return (_normalized(h) * w.float()).to(x.dtype), h.to(x.dtype)


def _plain_gemma_add(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    h = x.float() + r.float()
    return (_normalized(h) * (1 + w.float())).to(x.dtype), h.to(x.dtype)


def _plain_layer(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = x.float() - x.float().mean(-1, keepdim=True)
    return (_normalized(h) * w.float() + b.float()).to(x.dtype)


def _plain_gated(x: Tensor, w: Tensor, z: Tensor) -> Tensor:
    return (_normalized(x.float()) * w.float() * torch.nn.functional.silu(z.float())).to(x.dtype)


def _plain_gate_first(x: Tensor, w: Tensor, z: Tensor, group: int) -> Tensor:
    h = (x.float() * torch.nn.functional.silu(z.float())).unflatten(-1, (-1, group))
    return (_normalized(h).flatten(-2) * w.float()).to(x.dtype)


def _plain_l2(x: Tensor) -> Tensor:
    h = x.float()
    return (h * torch.rsqrt(h.square().sum(-1, keepdim=True) + EPS)).to(x.dtype)


def _fp8(y: Tensor) -> Tensor:
    return y.clamp(-FP8_MAX, FP8_MAX).to(FP8)


def _plain_static_quant(x: Tensor, w: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return _fp8(_normalized(x.float()) * w.float() / scale), scale


def _plain_static_quant_add(x: Tensor, r: Tensor, w: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    h = x.float() + r.float()
    return _fp8(_normalized(h) * w.float() / scale), scale, h.to(x.dtype)


def _plain_dynamic_quant(x: Tensor, w: Tensor, group: int) -> tuple[Tensor, Tensor]:
    y = (_normalized(x.float()) * w.float()).unflatten(-1, (-1, group))
    scale = y.abs().amax(-1, keepdim=True) / FP8_MAX
    return _fp8(y / scale).flatten(-2), scale.squeeze(-1)


#: Op -> the plain formula, and its arguments from a set of buffers.
FORMULAS: dict[str, tuple[Callable[..., Any], Callable[[Buffers], tuple[Any, ...]]]] = {
    "rms": (_plain_rms, lambda s: (s.x, s.w)),
    "add": (_plain_add, lambda s: (s.x, s.r, s.w)),
    "gemma": (_plain_gemma, lambda s: (s.x, s.w)),
    "gemma_add": (_plain_gemma_add, lambda s: (s.x, s.r, s.w)),
    "layer": (_plain_layer, lambda s: (s.x, s.w, s.b)),
    "gated": (_plain_gated, lambda s: (s.x, s.w, s.z)),
    "gate_first": (_plain_gate_first, lambda s: (s.x, s.w, s.z, s.point.width)),
    "groups": (_plain_gate_first, lambda s: (s.x, s.w, s.z, s.point.group)),
    "qk": (_plain_rms, lambda s: (s.x, s.w)),
    "l2": (_plain_l2, lambda s: (s.x,)),
    "static_quant": (_plain_static_quant, lambda s: (s.x, s.w, s.scale)),
    "static_quant_add": (_plain_static_quant_add, lambda s: (s.x, s.r, s.w, s.scale)),
    "token_quant": (_plain_dynamic_quant, lambda s: (s.x, s.w, s.point.width)),
    "block_quant": (_plain_dynamic_quant, lambda s: (s.x, s.w, BLOCK)),
}


def value(result: Any) -> Tensor:
    """What a call computed, in fp32: its first output, times its scales where that is quantised."""
    if not isinstance(result, tuple):
        return result.float()  # type: ignore[no-any-return]
    y, second = result[0], result[1]
    if y.dtype != FP8:
        return y.float()  # type: ignore[no-any-return]
    if second.numel() > 1:
        return (y.float().unflatten(-1, (second.shape[-1], -1)) * second.unsqueeze(-1)).flatten(-2)  # type: ignore[no-any-return]
    return y.float() * second  # type: ignore[no-any-return]
