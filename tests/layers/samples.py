"""Layers and inputs for the tests.

96 is no power of two, and the rows have outliers, so that a wrong divisor, a wrong eps or a rounding in the wrong place
shows. The values of the ops are tested with the ops, so here one width is enough.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from norm_plugin.layers import GemmaRMSNorm, LayerNorm, LayerNormGated, RMSNorm, RMSNormGated

WIDTH = 96
GROUP = 32
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
LAYERS: list[Callable[[], nn.Module]] = [
    lambda: RMSNorm(WIDTH),
    lambda: GemmaRMSNorm(WIDTH),
    lambda: LayerNorm(WIDTH),
    lambda: RMSNormGated(WIDTH, group_size=GROUP),
    lambda: LayerNormGated(WIDTH),
]


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    x[..., ::32] *= 20
    return x.to(dtype)


def randomized(layer: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """The layer with parameters that differ from their initial values."""
    with torch.no_grad():
        for seed, parameter in enumerate(layer.parameters()):
            parameter += draw(*parameter.shape, seed=100 + seed) / 4
    return layer.to(dtype)
