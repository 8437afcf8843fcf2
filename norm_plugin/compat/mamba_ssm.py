"""mamba_ssm's gated norms, as in `mamba_ssm.ops.triton.layernorm_gated`. FLA, vLLM and SGLang use the same names.

The functions are the public ones. They have mamba_ssm's arguments first, then those that the others added.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from norm_plugin import checks, ops
from norm_plugin.functions import layernorm_fn, rmsnorm_fn
from norm_plugin.layers import LayerNormGated, RMSNormGated
from norm_plugin.native import _layer_norm_fwd_native, rmsnorm_fn_native
from norm_plugin.native.gated import grouped
from norm_plugin.native.layer import affine
from norm_plugin.numerics import FP32

__all__ = ["LayerNorm", "RMSNorm", "_layer_norm_fwd", "layernorm_fn", "rms_norm_ref", "rmsnorm_fn"]

LayerNorm = LayerNormGated


class RMSNorm(RMSNormGated):
    """RMSNormGated with mamba_ssm's default: the gate comes after the norm."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        activation: str = "swish",
    ) -> None:
        super().__init__(hidden_size, eps, group_size, norm_before_gate, device, dtype, activation)


def _layer_norm_fwd(
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
    """(out, mean, rstd) of a 2-D x, always in PyTorch. Statistics are group-major; mean is None for RMSNorm."""
    if x.dim() != 2:
        raise ValueError(f"x has shape {list(x.shape)}; it must be 2-D. Flatten its leading dimensions.")
    if out is not None:
        checks.same_shape("out", out, "x", x)
    how = (group_size, norm_before_gate, is_rms_norm, activation)
    checks.check(ops.GATED_NORM, (x, weight, bias, z, eps, *how, FP32.name))
    return _layer_norm_fwd_native(x, weight, bias, eps, z, out, *how)


def rms_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    upcast: bool = True,
) -> Tensor:
    """The formula in PyTorch: in fp32 with one rounding, or without `upcast` in the dtype of x, rounded at every
    step."""
    if upcast:
        return rmsnorm_fn_native(x, weight, bias, z, eps, group_size, norm_before_gate)
    gate = None if z is None else F.silu(z)
    xhat, _, _ = grouped(x if gate is None or norm_before_gate else x * gate, group_size, eps, is_rms_norm=True)
    y = affine(xhat.flatten(-2), weight, bias)
    return y if gate is None or not norm_before_gate else y * gate
