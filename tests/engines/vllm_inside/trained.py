"""Calls of vLLM's norm layers beside what a trainer has for each of them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, LayerNorm, RMSNorm, RMSNormGated
from vllm.model_executor.layers.mamba.mamba_mixer2 import Mixer2RMSNormGated
from vllm.third_party.flash_linear_attention.ops import layernorm_guard
from vllm.third_party.flash_linear_attention.ops.kda import FusedRMSNormGated

from norm_plugin import layers
from tests.engines.same_bits import Case

EPS = 1e-5


def random_weights(layer: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Give a layer of vLLM some, which are the trainer's too."""
    for p in layer.parameters():
        p.data = (torch.randn_like(p, dtype=torch.float32) * 0.2 + 1).to(dtype)
    return dict(layer.named_parameters())


def cases(rows: int, width: int, dtype: torch.dtype) -> Iterator[Case]:
    """Every family; a third of a row makes a group."""
    x, residual = (torch.randn(rows, width).to(dtype) for _ in range(2))
    like = {"device": x.device, "dtype": dtype}
    wide = {"device": x.device, "dtype": torch.float32}
    for weight, how in (("", like), (", fp32 weight", wide))[: 1 if dtype == torch.float32 else 2]:
        layer: Any = RMSNorm(width, EPS, dtype=how["dtype"])
        weights = random_weights(layer, how["dtype"])
        make = partial(_rms_norm, width, how)
        yield Case(f"RMSNorm{weight}", "rmsnorm", layer, make, weights, (x,))
        yield Case(f"RMSNorm{weight}, residual", "fused_add_rmsnorm", layer, make, weights, (x, residual))
    layer = GemmaRMSNorm(width, EPS)
    weights, make = random_weights(layer, dtype), partial(_gemma, width, like)
    yield Case("GemmaRMSNorm", "rmsnorm", layer, make, weights, (x,))
    yield Case("GemmaRMSNorm, residual", "add_rmsnorm", layer, make, weights, (x, residual))
    layer = LayerNorm(width, EPS)
    weights = random_weights(layer, dtype)
    yield Case("LayerNorm", "layernorm", layer, partial(_layer_norm, width, like), weights, (x + 3,))
    for before in (True, False):
        for group in (None, width // 3):
            named = {"eps": EPS, "group_size": group, "norm_before_gate": before}
            label = f"norm {'before' if before else 'after'} gate, {'groups' if group else 'one group'}"
            layer = RMSNormGated(width, **named)
            weights, make = random_weights(layer, dtype), partial(_gated, layers.RMSNormGated, width, like, named)
            yield Case(f"RMSNormGated, {label}", "gated_norm", layer, make, weights, (x, residual))
            call = partial(_rmsnorm_fn, layer.weight, named)
            yield Case(f"rmsnorm_fn, {label}", "gated_norm", call, make, weights, (x, residual))
            weights = {"weight": layer.weight, "bias": torch.randn(width).to(dtype)}
            call = partial(_layernorm_fn, weights, named)
            make = partial(_gated, layers.LayerNormGated, width, like, named)
            yield Case(f"layernorm_fn, {label}", "gated_norm", call, make, weights, (x, residual))
    for groups in (1, 3):
        layer = Mixer2RMSNormGated(width, groups, eps=EPS)
        named = {"eps": EPS, "group_size": width // groups, "norm_before_gate": False}
        weights, make = random_weights(layer, dtype), partial(_gated, layers.RMSNormGated, width, like, named)
        yield Case(f"Mixer2RMSNormGated, {groups} groups", "gated_norm", layer, make, weights, (x, residual))
    layer = FusedRMSNormGated(width, eps=EPS, activation="sigmoid")
    named = {"eps": EPS, "norm_before_gate": True, "activation": "sigmoid"}
    weights, make = random_weights(layer, dtype), partial(_gated, layers.RMSNormGated, width, like, named)
    yield Case("FusedRMSNormGated", "gated_norm", layer, make, weights, (x, residual))


def _rmsnorm_fn(weight: Tensor, named: dict[str, Any], x: Tensor, z: Tensor) -> Tensor:
    return layernorm_guard.rmsnorm_fn(x, weight, None, z=z, **named)


def _layernorm_fn(weights: dict[str, Tensor], named: dict[str, Any], x: Tensor, z: Tensor) -> Tensor:
    return layernorm_guard.layernorm_fn(x, weights["weight"], weights["bias"], z=z, **named)


# --- the trainer's ------------------------------------------------------------------------------------------------


def _rms_norm(width: int, how: dict[str, Any], numerics: str) -> nn.Module:
    return layers.RMSNorm(width, EPS, numerics=numerics, **how)


def _gemma(width: int, how: dict[str, Any], numerics: str) -> nn.Module:
    return layers.GemmaRMSNorm(width, EPS, numerics=numerics, **how)


def _layer_norm(width: int, how: dict[str, Any], numerics: str) -> nn.Module:
    return layers.LayerNorm(width, EPS, numerics=numerics, **how)


def _gated(kind: Any, width: int, how: dict[str, Any], named: dict[str, Any], numerics: str) -> nn.Module:
    return kind(width, numerics=numerics, **named, **how)
