"""What cpu.py compares: for each native op the plain formula, and torch.nn.functional where it has the op.

The functions of one subject take the same arguments and return the same thing, so that they are called alike. The
plain formulas are what somebody writes who wants the same result: fp32 inside, one rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import norm_plugin
from norm_plugin.bench import formulas
from norm_plugin.bench.buffers import EPS, FP8
from norm_plugin.bench.formulas import centred, saturated, unit
from norm_plugin.native import gated, layer, quant, rms

DECODE, PREFILL, HEADS = ((1, 4096), (32, 4096)), ((512, 4096),), ((2048, 128),)
GROUP = 512


@dataclass(frozen=True)
class Subject:
    """An op. `takes`: what it is called with, by the names in `made`, and `constants` behind that.

    `in_bar`: its compiled form must be at least as fast as the plain formula's. `written`: the places of what is
    written in place, where that is more than one argument.
    """

    name: str
    native: Callable[..., Any]
    plain: Callable[..., Any]
    functional: Callable[..., Any]
    public: Callable[..., Any]
    takes: str
    sizes: tuple[tuple[int, int], ...] = ((32, 4096), *PREFILL)
    constants: tuple[object, ...] = ()
    in_bar: bool = False
    written: tuple[int, ...] = ()

    def arguments(self, rows: int, width: int, dtype: torch.dtype) -> tuple[Any, ...]:
        return (*(made(name, rows, width, dtype) for name in self.takes.split()), *self.constants)


def made(name: str, rows: int, width: int, dtype: torch.dtype) -> Any:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape).to(dtype)

    match name:
        case "x" | "r" | "z":
            return normal(rows, width)
        case "w":
            return (1 + 0.25 * torch.randn(width)).to(dtype)
        case "gemma_w":
            return (1 + 0.25 * torch.randn(width)).to(dtype) - 1
        case "b":
            return normal(width)
        case "matrix":
            return normal(128, width)
        case "c":
            return normal(128)
        case "out":
            return torch.empty(rows, width, dtype=FP8)
        case "scale":
            return torch.tensor(0.02)
        case "group":
            return min(width, GROUP)
    return {"eps": EPS, "none": None}[name]


def plain_gemma(x: Tensor, w: Tensor, eps: float, numerics: str, gemma: bool) -> Tensor:
    return (unit(x.float(), eps) * (1 + w.float())).to(x.dtype)


def plain_fused_add_rms(x: Tensor, r: Tensor, w: Tensor, eps: float) -> None:
    y, h = formulas.add(x, r, w, eps)
    x.copy_(y)
    r.copy_(h)


def functional_add_rms(x: Tensor, r: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    h = x + r
    return F.rms_norm(h, w.shape, w, eps), h


def functional_fused_add_rms(x: Tensor, r: Tensor, w: Tensor, eps: float) -> None:
    r.add_(x)
    x.copy_(F.rms_norm(r, w.shape, w, eps))


def plain_layer_linear(x: Tensor, w: Tensor, b: Tensor, matrix: Tensor, c: Tensor, eps: float) -> Tensor:
    return F.linear(formulas.layer(x, w, b, eps), matrix, c)


def functional_layer_linear(x: Tensor, w: Tensor, b: Tensor, matrix: Tensor, c: Tensor, eps: float) -> Tensor:
    return F.linear(F.layer_norm(x, w.shape, w, b, eps), matrix, c)


def plain_gated(
    x: Tensor, w: Tensor, b: Tensor | None, z: Tensor, eps: float, group: int, norm_before_gate: bool, is_rms: bool
) -> Tensor:
    h, gate = x.float(), F.silu(z.float())
    if not norm_before_gate:
        h = h * gate
    h = h.unflatten(-1, (-1, group))
    y = unit(h if is_rms else centred(h), eps).flatten(-2) * w.float()
    if b is not None:
        y = y + b.float()
    return (y * gate if norm_before_gate else y).to(x.dtype)


def functional_gated(
    x: Tensor, w: Tensor, b: Tensor | None, z: Tensor, eps: float, group: int, norm_before_gate: bool, is_rms: bool
) -> Tensor:
    h = (x if norm_before_gate else x * F.silu(z)).unflatten(-1, (-1, group))
    y = (F.rms_norm(h, (group,), None, eps) if is_rms else F.layer_norm(h, (group,), None, None, eps)).flatten(-2) * w
    if b is not None:
        y = y + b
    return y * F.silu(z) if norm_before_gate else y


def gated_subject(name: str, norm_before_gate: bool, is_rms: bool) -> Subject:
    return Subject(
        name, gated.gated_norm, plain_gated, functional_gated, norm_plugin.layernorm_fn,
        f"x w {'none' if is_rms else 'b'} z eps group", (*DECODE, *PREFILL, *HEADS), (norm_before_gate, is_rms),
        in_bar=True,
    )  # fmt: skip


def plain_static(out: Tensor, x: Tensor, w: Tensor, scale: Tensor, eps: float) -> None:
    out.copy_(saturated(unit(x.float(), eps) * w.float() * (1 / scale)))


def functional_static(out: Tensor, x: Tensor, w: Tensor, scale: Tensor, eps: float) -> None:
    out.copy_(saturated(F.rms_norm(x, w.shape, w, eps) / scale))


def plain_fused_static(out: Tensor, x: Tensor, r: Tensor, w: Tensor, scale: Tensor, eps: float) -> None:
    h = x.float() + r.float()
    r.copy_(h)
    out.copy_(saturated(unit(h, eps) * w.float() * (1 / scale)))


def functional_fused_static(out: Tensor, x: Tensor, r: Tensor, w: Tensor, scale: Tensor, eps: float) -> None:
    r.add_(x)
    functional_static(out, r, w, scale, eps)


def by_largest(y: Tensor) -> tuple[Tensor, Tensor]:
    scale = (y.abs().amax(-1, keepdim=True).float() / 448.0).clamp(min=1.0 / (448.0 * 512.0))
    return saturated(y / scale), scale


def plain_dynamic(x: Tensor, w: Tensor, r: None, eps: float) -> tuple[Tensor, Tensor]:
    return by_largest(unit(x.float(), eps) * w.float())


def functional_dynamic(x: Tensor, w: Tensor, r: None, eps: float) -> tuple[Tensor, Tensor]:
    return by_largest(F.rms_norm(x, w.shape, w, eps))


def plain_block(x: Tensor, w: Tensor, r: None, eps: float, group: int) -> tuple[Tensor, Tensor]:
    out, scales = by_largest((unit(x.float(), eps) * w.float()).unflatten(-1, (-1, group)))
    return out.flatten(-2), scales.squeeze(-1)


def functional_block(x: Tensor, w: Tensor, r: None, eps: float, group: int) -> tuple[Tensor, Tensor]:
    out, scales = by_largest(F.rms_norm(x, w.shape, w, eps).unflatten(-1, (-1, group)))
    return out.flatten(-2), scales.squeeze(-1)


def plain_layer_static(out: Tensor, x: Tensor, w: Tensor, b: Tensor, scale: Tensor, eps: float) -> None:
    out.copy_(saturated((unit(centred(x.float()), eps) * w.float() + b.float()) * (1 / scale)))


def functional_layer_static(out: Tensor, x: Tensor, w: Tensor, b: Tensor, scale: Tensor, eps: float) -> None:
    out.copy_(saturated(F.layer_norm(x, w.shape, w, b, eps) / scale))


SUBJECTS = (
    Subject(
        "rmsnorm", rms.rmsnorm, formulas.rms, lambda x, w, eps: F.rms_norm(x, w.shape, w, eps), norm_plugin.rmsnorm,
        "x w eps", (*DECODE, *PREFILL), in_bar=True,
    ),
    Subject(
        "rmsnorm, gemma", rms.rmsnorm, plain_gemma,
        lambda x, w, eps, numerics, gemma: F.rms_norm(x, w.shape, 1 + w, eps),
        lambda x, w, eps, numerics, gemma: norm_plugin.gemma_rmsnorm(x, w, eps),
        "x gemma_w eps", (*DECODE, *PREFILL), ("fp32", True), in_bar=True,
    ),
    Subject(
        "add_rmsnorm", rms.add_rmsnorm, formulas.add, functional_add_rms, norm_plugin.add_rmsnorm,
        "x r w eps", (*DECODE, *PREFILL), in_bar=True,
    ),
    Subject(
        "fused_add_rmsnorm", rms.fused_add_rmsnorm, plain_fused_add_rms, functional_fused_add_rms,
        norm_plugin.fused_add_rmsnorm, "x r w eps", (*DECODE, *PREFILL), in_bar=True, written=(0, 1),
    ),
    gated_subject("gated RMS, norm then gate", True, True),
    gated_subject("gated RMS, gate then norm", False, True),
    gated_subject("gated LayerNorm", True, False),
    Subject(
        "l2norm", rms.l2norm, formulas.l2, lambda x, eps: F.normalize(x, dim=-1, eps=eps), norm_plugin.l2norm,
        "x eps", (*PREFILL, *HEADS),
    ),
    Subject(
        "layernorm", layer.layernorm, formulas.layer, lambda x, w, b, eps: F.layer_norm(x, w.shape, w, b, eps),
        norm_plugin.layernorm, "x w b eps",
    ),
    Subject(
        "layernorm_linear", layer.layernorm_linear, plain_layer_linear, functional_layer_linear,
        norm_plugin.layernorm_linear, "x w b matrix c eps",
    ),
    Subject(
        "rmsnorm_quant", quant.rmsnorm_quant, plain_static, functional_static, norm_plugin.rmsnorm_quant,
        "out x w scale eps",
    ),
    Subject(
        "fused_add_rmsnorm_quant", quant.fused_add_rmsnorm_quant, plain_fused_static, functional_fused_static,
        norm_plugin.fused_add_rmsnorm_quant, "out x r w scale eps", written=(0, 2),
    ),
    Subject(
        "rmsnorm_dynamic_quant", lambda x, w, r, eps: quant.rmsnorm_dynamic_quant(x, w, r, eps=eps),
        plain_dynamic, functional_dynamic, lambda x, w, r, eps: norm_plugin.rmsnorm_dynamic_quant(x, w, r, eps=eps),
        "x w none eps",
    ),
    Subject(
        "rmsnorm_block_quant", quant.rmsnorm_block_quant, plain_block, functional_block,
        norm_plugin.rmsnorm_block_quant, "x w none eps", constants=(128,),
    ),
    Subject(
        "layernorm_quant", quant.layernorm_quant, plain_layer_static, functional_layer_static,
        norm_plugin.layernorm_quant, "out x w b scale eps",
    ),
)  # fmt: skip
