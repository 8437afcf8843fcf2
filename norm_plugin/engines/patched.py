"""What an engine calls that was patched in source (patches/): its gated norm in plain PyTorch, counted."""

from __future__ import annotations

import torch
from torch import Tensor

from norm_plugin import settings
from norm_plugin.engines import call_counts
from norm_plugin.native import _layer_norm_fwd_native

OP = "gated_norm"

settings.get()  # a flag with a wrong value is an error when the engine is imported, and not at the first token


def layer_norm_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    z: Tensor | None = None,
    out: Tensor | None = None,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
    activation: str = "swish",
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The (out, mean, rstd) of the engine's function of this name; z may be [tokens, heads, N] beside the rows of x."""
    if not torch.compiler.is_compiling():
        call_counts.count(OP, x, weight)
    rows = None if z is None else z.reshape(x.shape)
    how = (group_size, norm_before_gate, is_rms_norm, activation)
    return _layer_norm_fwd_native(x, weight, bias, eps, rows, out, *how)


def kept(x: Tensor, weight: Tensor, reason: str) -> None:
    """Count a call that the engine's own kernel runs, for this reason."""
    if not torch.compiler.is_compiling():
        call_counts.count(OP, x, weight, reason)
