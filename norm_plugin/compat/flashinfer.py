"""FlashInfer's norms: `import norm_plugin.compat.flashinfer as flashinfer`, or in place of `flashinfer.norm`.

The public functions have FlashInfer's names and arguments already. Only its LayerNorms name their arguments
differently, and FlashInfer rounds one of them before it quantises it. These functions take all dtypes, ranks and
devices that the public functions take; FlashInfer takes one dtype, two ranks and no CPU tensor.
"""

from __future__ import annotations

from torch import Tensor

from norm_plugin import functions
from norm_plugin.functions import (
    fused_add_rmsnorm,
    fused_add_rmsnorm_quant,
    gemma_fused_add_rmsnorm,
    gemma_rmsnorm,
    rmsnorm,
    rmsnorm_quant,
)
from norm_plugin.numerics import FLASHINFER_LAYER

__all__ = [
    "fused_add_rmsnorm",
    "fused_add_rmsnorm_quant",
    "gemma_fused_add_rmsnorm",
    "gemma_rmsnorm",
    "layernorm",
    "layernorm_quant",
    "rmsnorm",
    "rmsnorm_quant",
]


def layernorm(input: Tensor, gemma: Tensor, beta: Tensor, eps: float = 1e-6) -> Tensor:
    """(input - mean) / std * gemma + beta, row by row."""
    return functions.layernorm(input, gemma, beta, eps)


def layernorm_quant(
    out: Tensor, input: Tensor, gemma: Tensor, beta: Tensor, scale: Tensor | float, eps: float = 1e-6
) -> None:
    """out = layernorm(input, gemma, beta) / scale, rounded and saturated to out's dtype."""
    functions.layernorm_quant(out, input, gemma, beta, scale, eps, numerics=FLASHINFER_LAYER.name)
