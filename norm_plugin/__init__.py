"""Normalization layers for vLLM and SGLang: the public functions."""

from norm_plugin.functions import (
    add_rmsnorm,
    fused_add_rmsnorm,
    fused_add_rmsnorm_quant,
    gemma_fused_add_rmsnorm,
    gemma_rmsnorm,
    l2norm,
    layernorm,
    layernorm_fn,
    layernorm_linear,
    layernorm_quant,
    rmsnorm,
    rmsnorm_block_quant,
    rmsnorm_dynamic_quant,
    rmsnorm_fn,
    rmsnorm_quant,
)

__all__ = [
    "add_rmsnorm",
    "fused_add_rmsnorm",
    "fused_add_rmsnorm_quant",
    "gemma_fused_add_rmsnorm",
    "gemma_rmsnorm",
    "l2norm",
    "layernorm",
    "layernorm_fn",
    "layernorm_linear",
    "layernorm_quant",
    "rmsnorm",
    "rmsnorm_block_quant",
    "rmsnorm_dynamic_quant",
    "rmsnorm_fn",
    "rmsnorm_quant",
]
