"""For each op the plain formula, as somebody writes it who wants the same result: what torch.compile gets."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from norm_plugin.bench.buffers import EPS, FP8, Function

FP8_MAX = 448.0


def unit(h: Tensor, eps: float = EPS) -> Tensor:
    """Rows whose root mean square is 1."""
    return h * (h.square().mean(-1, keepdim=True) + eps).rsqrt()


def centred(h: Tensor) -> Tensor:
    return h - h.mean(-1, keepdim=True)


def rms(x: Tensor, w: Tensor, eps: float = EPS) -> Tensor:
    return (unit(x.float(), eps) * w.float()).to(x.dtype)


def gemma(x: Tensor, w: Tensor) -> Tensor:
    return (unit(x.float()) * (1 + w.float())).to(x.dtype)


def add(x: Tensor, r: Tensor, w: Tensor, eps: float = EPS) -> tuple[Tensor, Tensor]:
    h = x.float() + r.float()
    return (unit(h, eps) * w.float()).to(x.dtype), h.to(x.dtype)


def gemma_add(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    h = x.float() + r.float()
    return (unit(h) * (1 + w.float())).to(x.dtype), h.to(x.dtype)


def layer(x: Tensor, w: Tensor, b: Tensor, eps: float = EPS) -> Tensor:
    return (unit(centred(x.float()), eps) * w.float() + b.float()).to(x.dtype)


def gated(x: Tensor, w: Tensor, z: Tensor) -> Tensor:
    return (unit(x.float()) * w.float() * F.silu(z.float())).to(x.dtype)


def in_groups(x: Tensor, w: Tensor, z: Tensor, group: int) -> Tensor:
    h = (x.float() * F.silu(z.float())).unflatten(-1, (-1, group))
    return (unit(h).flatten(-2) * w.float()).to(x.dtype)


def gate_first(x: Tensor, w: Tensor, z: Tensor) -> Tensor:
    return in_groups(x, w, z, x.shape[-1])


def l2(x: Tensor, eps: float = EPS) -> Tensor:
    h = x.float()
    return (h * (h.square().sum(-1, keepdim=True) + eps).rsqrt()).to(x.dtype)


def saturated(y: Tensor) -> Tensor:
    return y.clamp(-FP8_MAX, FP8_MAX).to(FP8)


def static_quant(x: Tensor, w: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return saturated(unit(x.float()) * w.float() / scale), scale


def static_quant_add(x: Tensor, r: Tensor, w: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    h = x.float() + r.float()
    return saturated(unit(h) * w.float() / scale), scale, h.to(x.dtype)


def block_quant(x: Tensor, w: Tensor, block: int) -> tuple[Tensor, Tensor]:
    y = (unit(x.float()) * w.float()).unflatten(-1, (-1, block))
    scale = y.abs().amax(-1, keepdim=True) / FP8_MAX
    return saturated(y / scale).flatten(-2), scale.squeeze(-1)


def token_quant(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    return block_quant(x, w, x.shape[-1])


FORMULAS: dict[str, Function] = {
    "rms": rms, "add": add, "gemma": gemma, "gemma_add": gemma_add, "layer": layer, "gated": gated,
    "gate_first": gate_first, "groups": in_groups, "qk": rms, "l2": l2, "static_quant": static_quant,
    "static_quant_add": static_quant_add, "token_quant": token_quant, "block_quant": block_quant,
}  # fmt: skip
