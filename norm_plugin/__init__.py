"""Normalization layers for vLLM and SGLang: the public functions."""

from norm_plugin.needs import check_torch
from norm_plugin.version import __version__ as __version__

check_torch()  # before the rest, which would fail on a torch that is too old with an error of its own

from norm_plugin.functions import (  # noqa: E402
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
