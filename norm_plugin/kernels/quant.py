"""Binds the norms with a quantised output: the kernels of the norms quantise in the same pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from norm_plugin.kernels import Bound, Kernel, Refusal, gated
from norm_plugin.kernels.launch import Launch
from norm_plugin.kernels.rms import bind
from norm_plugin.kernels.rms_kernel import PER_BLOCK, PER_TOKEN, STATIC
from norm_plugin.native.quant import MIN_SCALE, QMAX
from norm_plugin.native.rms import maker_of_outputs
from norm_plugin.numerics import LAYER_QUANT_NUMERICS, NUMERICS


def bind_static(
    out: Tensor, input: Tensor, residual: Tensor | None, weight: Tensor | None, numerics: str, gemma: bool,
    enable_pdl: bool | None,
) -> Launch:  # fmt: skip
    """The launch of a norm with one scale for the whole tensor."""
    return bind(
        input, residual, weight, out, residual, NUMERICS[numerics], gemma, None, enable_pdl,
        quant=STATIC, qmax=QMAX[out.dtype],
    )  # fmt: skip


def bind_rmsnorm_quant(
    out: Tensor, input: Tensor, weight: Tensor | None, scale: Tensor, eps: float, numerics: str, gemma: bool,
    enable_pdl: bool | None,
) -> Bound:  # fmt: skip
    launch = bind_static(out, input, None, weight, numerics, gemma, enable_pdl)
    width = input.shape[-1]

    def run(out: Tensor, input: Tensor, weight: Tensor | None, scale: Tensor, eps: float, *_: Any) -> None:
        launch(input.numel() // width, eps, input, None, weight, out, None, scale, None)

    return Bound(run, (launch,))


def bind_fused_add_rmsnorm_quant(
    out: Tensor, input: Tensor, residual: Tensor, weight: Tensor | None, scale: Tensor, eps: float, numerics: str,
    gemma: bool, enable_pdl: bool | None,
) -> Bound:  # fmt: skip
    launch = bind_static(out, input, residual, weight, numerics, gemma, enable_pdl)
    width = input.shape[-1]

    def run(
        out: Tensor, input: Tensor, residual: Tensor, weight: Tensor | None, scale: Tensor, eps: float, *_: Any
    ) -> None:
        launch(input.numel() // width, eps, input, residual, weight, out, residual, scale, None)

    return Bound(run, (launch,))


def bind_rmsnorm_dynamic_quant(
    input: Tensor, weight: Tensor | None, residual: Tensor | None, scale_ub: Tensor | None, eps: float,
    quant_dtype: torch.dtype, numerics: str, gemma: bool, enable_pdl: bool | None,
) -> Bound:  # fmt: skip
    new_output = maker_of_outputs(input)
    out = new_output(input, dtype=quant_dtype)
    launch = bind(
        input, residual, weight, out, residual, NUMERICS[numerics], gemma, None, enable_pdl,
        quant=PER_TOKEN, qmax=QMAX[quant_dtype], min_scale=MIN_SCALE[quant_dtype],
    )  # fmt: skip
    width = input.shape[-1]

    def run(
        input: Tensor, weight: Tensor | None, residual: Tensor | None, scale_ub: Tensor | None, eps: float,
        quant_dtype: torch.dtype, *_: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        out = new_output(input, dtype=quant_dtype)
        scales = input.new_empty((*input.shape[:-1], 1), dtype=torch.float32)
        launch(input.numel() // width, eps, input, residual, weight, out, residual, scales, scale_ub)
        return out, scales

    return Bound(run, (launch,))


def bind_rmsnorm_block_quant(
    input: Tensor, weight: Tensor | None, residual: Tensor | None, eps: float, group_size: int,
    quant_dtype: torch.dtype, numerics: str, gemma: bool, enable_pdl: bool | None,
) -> Bound:  # fmt: skip
    new_output = maker_of_outputs(input)
    out = new_output(input, dtype=quant_dtype)
    launch = bind(
        input, residual, weight, out, residual, NUMERICS[numerics], gemma, None, enable_pdl,
        quant=PER_BLOCK, group=group_size, qmax=QMAX[quant_dtype], min_scale=MIN_SCALE[quant_dtype],
    )  # fmt: skip
    if launch.config.block % group_size:
        raise Refusal(f"blocks of {group_size} columns do not divide the kernel's chunks of {launch.config.block}")
    width = input.shape[-1]

    def run(
        input: Tensor, weight: Tensor | None, residual: Tensor | None, eps: float, group_size: int,
        quant_dtype: torch.dtype, *_: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        out = new_output(input, dtype=quant_dtype)
        scales = input.new_empty((*input.shape[:-1], width // group_size), dtype=torch.float32)
        launch(input.numel() // width, eps, input, residual, weight, out, residual, scales, None)
        return out, scales

    return Bound(run, (launch,))


def bind_layernorm_quant(
    out: Tensor, input: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor, eps: float, numerics: str
) -> Bound:
    launch = gated.bind(input, weight, bias, None, out, LAYER_QUANT_NUMERICS[numerics], qmax=QMAX[out.dtype])
    width = input.shape[-1]

    def run(
        out: Tensor, input: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor, eps: float, *_: Any
    ) -> None:
        launch(input.numel() // width, eps, input, None, weight, bias, out, scale, None)

    return Bound(run, (launch,))


KERNELS: dict[str, Kernel] = {
    "rmsnorm_quant": bind_rmsnorm_quant,
    "fused_add_rmsnorm_quant": bind_fused_add_rmsnorm_quant,
    "rmsnorm_dynamic_quant": bind_rmsnorm_dynamic_quant,
    "rmsnorm_block_quant": bind_rmsnorm_block_quant,
    "layernorm_quant": bind_layernorm_quant,
}
