"""Calls of SGLang's norm layers and functions beside what a trainer has for each of them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from sglang.kernels.ops.attention.fla import fused_norm_gate, layernorm_gated
from sglang.srt.layers import layernorm as norms
from torch import Tensor, nn

from norm_plugin import layers
from tests.engines.same_bits import Case

EPS = 1e-5


def cases(rows: int, width: int, dtype: torch.dtype, method: str) -> Iterator[Case]:
    """Every family, its classes called by `method`, on torch's default device; a third of a row makes a group."""
    x, residual, third = (torch.randn(rows, width).to(dtype) for _ in range(3))
    in_place = method == "forward_cuda"
    added = "fused_add_rmsnorm" if in_place else "add_rmsnorm"
    how: dict[str, Any] = {"device": x.device, "dtype": dtype}

    def of_class(kind: str, trainers: Any, more: dict[str, Any], *addends: tuple[Tensor, ...]) -> Iterator[Case]:
        if not hasattr(norms, kind):  # of an older SGLang, where it is a hook that is missing
            return
        layer = getattr(norms, kind)(width, eps=EPS, **more).to(**how).requires_grad_(False)
        for p in layer.parameters():
            p.copy_(torch.randn(width) * 0.2 + 1)
        named = {"has_weight": False} if kind == "RMSNormWithoutScale" else {}
        rounded = ", ".join(name for name, value in more.items() if value is True)
        for inputs in ((x,), *addends):
            op = ("rmsnorm" if kind != "LayerNorm" else "layernorm") if len(inputs) == 1 else added
            name = " ".join(filter(None, [kind, rounded, f"of a sum of {len(inputs)}" if len(inputs) > 1 else ""]))
            make = partial(_made, trainers, width, EPS, named | how)
            yield Case(name, op, getattr(layer, method), make, dict(layer.named_parameters()), inputs)

    sums = [(x, residual)] if in_place else [(x, residual), (x, residual, third)]
    yield from of_class("RMSNorm", layers.RMSNorm, {}, *sums)
    yield from of_class("RMSNorm", layers.RMSNorm, {"cast_x_before_out_mul": True}, (x, residual))
    yield from of_class("GemmaRMSNorm", layers.GemmaRMSNorm, {}, (x, residual))
    yield from of_class("Gemma3RMSNorm", layers.GemmaRMSNorm, {}, (x, residual))
    yield from of_class("Gemma4RMSNorm", layers.RMSNorm, {})
    yield from of_class("RMSNormWithoutScale", layers.RMSNorm, {})
    yield from of_class("LayerNorm", layers.LayerNorm, {"dtype": dtype})
    weights = {name: torch.randn(width).to(dtype) for name in ("weight", "bias")}
    for rms in (True, False):
        trainers, own = (layers.RMSNormGated, {"weight": weights["weight"], "bias": None}) if rms else (
            layers.LayerNormGated, weights)  # fmt: skip
        for before in (True, False):
            for group in (None, width // 3):
                named = {"group_size": group, "norm_before_gate": before}
                label = f"{'rms' if rms else 'layer'}, norm {'before' if before else 'after'} gate"
                call = partial(_norm_gated, {**own, **named, "eps": EPS, "is_rms_norm": rms})
                make = partial(_made, trainers, width, EPS, named | how)
                given = {key: value for key, value in own.items() if value is not None}
                label += ", groups" if group else ", one group"
                yield Case(f"rms_norm_gated, {label}", "gated_norm", call, make, given, (x, residual))
    layer = fused_norm_gate.FusedRMSNormGated(width, eps=EPS, activation="sigmoid", **how).requires_grad_(False)
    layer.weight.copy_(weights["weight"])
    make = partial(_made, layers.RMSNormGated, width, EPS, {"norm_before_gate": True, "activation": "sigmoid"} | how)
    yield Case("FusedRMSNormGated", "gated_norm", layer, make, dict(layer.named_parameters()), (x, residual))


def _norm_gated(named: dict[str, Any], x: Tensor, z: Tensor) -> Any:
    return layernorm_gated.rms_norm_gated(x=x, z=z, **named)


def _made(trainers: Any, width: int, eps: float, named: dict[str, Any], numerics: str) -> nn.Module:
    made: nn.Module = trainers(width, eps, numerics=numerics, **named)
    return made
