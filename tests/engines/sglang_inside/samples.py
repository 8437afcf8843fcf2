"""Layers of SGLang with random weights, and their inputs."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers import layernorm as norms
from torch import Tensor

WIDTH = 96
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16, outlier: bool = True) -> Tensor:
    x = torch.randn(*shape)
    if outlier:
        x[..., 7] *= 40
    return x.to(dtype)


def layer(kind: str, dtype: torch.dtype = torch.bfloat16, **more: Any) -> Any:
    """A norm of sglang.srt.layers.layernorm, WIDTH wide, with a weight that matters."""
    made = getattr(norms, kind)(WIDTH, eps=1e-5, **({"dtype": dtype} if kind == "LayerNorm" else {}), **more)
    made = made.to(dtype).requires_grad_(False)
    for name, p in made.named_parameters():
        p.copy_((torch.randn(WIDTH) * 0.3 + (1.0 if name == "weight" and "Gemma" not in kind else 0.0)).to(dtype))
    return made
