"""RMSNorm, its fused residual add, Gemma's variant and the l2 norm, in plain PyTorch: the specification.

`enable_pdl` is how a kernel is launched, and means nothing here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from norm_plugin import memory
from norm_plugin.numerics import FP32, NUMERICS, Numerics

#: The least number of elements that PyTorch's CPU spreads over threads.
SUMMED_IN_PARTS = 32768


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that everything is computed in: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def wide(x: Tensor) -> Tensor:
    """x in the dtype that everything is computed in."""
    return x.to(wide_dtype(x.dtype))


#: An output of a tensor's shape, and dtype if no other is given. It is contiguous, whatever the strides of the input:
#: those of a single row of a wider tensor would say nothing of the output of the next call.
new_output = partial(torch.empty_like, memory_format=torch.contiguous_format)


def maker_of_outputs(like: Tensor) -> Callable[..., Tensor]:
    """new_output for every tensor of this signature, by the quickest way."""
    return torch.empty_like if memory.packed(like) else new_output


def stored(y: Tensor, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """y as an output: in a dtype (that of `like`), and contiguous."""
    out = new_output(like, dtype=dtype)
    return y if y.dtype == out.dtype and y.stride() == out.stride() else out.copy_(y)


def by_row(reduce: Callable[..., Tensor], h: Tensor) -> Tensor:
    """reduce(h) of each row, [..., 1], the same whatever the batch. PyTorch's CPU sums a long row that is alone in
    parts, one a thread; beside itself it is summed as in any batch."""
    if h.shape[-1] < SUMMED_IN_PARTS or h.numel() != h.shape[-1]:
        return reduce(h, -1, keepdim=True)
    return reduce(h.expand(2, *h.shape), -1, keepdim=True)[0]


def inverse_rms(h: Tensor, eps: float, variance_size: int | None = None) -> Tensor:
    """rsqrt(mean(h^2) + eps) of each row, or of its first `variance_size` columns."""
    return torch.rsqrt(by_row(torch.mean, h[..., :variance_size].pow(2)) + eps)


def scaled(h: Tensor, s: Tensor, weight: Tensor | None, numerics: Numerics, gemma: bool, dtype: torch.dtype) -> Tensor:
    """h * s * w before its last rounding; `dtype` is the activation dtype that b() rounds to."""
    w = None if weight is None else weight.to(h.dtype) + 1 if gemma else weight.to(h.dtype)
    if numerics.weight_before_scale:
        return h * s if w is None else h * w * s
    y = h * s
    if numerics.round_before_weight:
        y = y.to(dtype).to(h.dtype)
    return y if w is None else y * w


def added(
    input: Tensor, residual: Tensor, eps: float, numerics: Numerics, variance_size: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(h, s, new_residual) of a fused add: what is scaled, by what, and what is written back."""
    total = wide(input) + wide(residual)
    new_residual = total.to(residual.dtype)
    rounded = new_residual.to(total.dtype)
    s = inverse_rms(rounded if numerics.variance_of_rounded_sum else total, eps, variance_size)
    return (rounded if numerics.output_of_rounded_sum else total), s, new_residual


def rmsnorm(
    input: Tensor,
    weight: Tensor | None,
    eps: float = 1e-6,
    numerics: str = FP32.name,
    gemma: bool = False,
    variance_size: int | None = None,
    enable_pdl: bool | None = None,
) -> Tensor:
    """The RMSNorm of every row; with `gemma` the weight is 1 + weight, added in fp32."""
    h = wide(input)
    s = inverse_rms(h, eps, variance_size)
    return stored(scaled(h, s, weight, NUMERICS[numerics], gemma, input.dtype), input)


def rmsnorm_out(
    input: Tensor,
    weight: Tensor | None,
    out: Tensor,
    eps: float = 1e-6,
    numerics: str = FP32.name,
    gemma: bool = False,
    variance_size: int | None = None,
    enable_pdl: bool | None = None,
) -> None:
    """rmsnorm, written into `out`."""
    out.copy_(rmsnorm(input, weight, eps, numerics, gemma, variance_size))


def add_rmsnorm(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float = 1e-6,
    numerics: str = FP32.name,
    gemma: bool = False,
    variance_size: int | None = None,
    enable_pdl: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """(norm(input + residual), input + residual): the fused add as a function, nothing is changed in place."""
    h, s, new_residual = added(input, residual, eps, NUMERICS[numerics], variance_size)
    out = scaled(h, s, weight, NUMERICS[numerics], gemma, input.dtype)
    return stored(out, input), stored(new_residual, residual)


def fused_add_rmsnorm(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float = 1e-6,
    numerics: str = FP32.name,
    gemma: bool = False,
    variance_size: int | None = None,
    enable_pdl: bool | None = None,
) -> None:
    """residual += input, then input = norm(residual), both in place."""
    out, new_residual = add_rmsnorm(input, residual, weight, eps, numerics, gemma, variance_size)
    input.copy_(out)
    residual.copy_(new_residual)


def l2norm(input: Tensor, eps: float = 1e-6, output_dtype: torch.dtype | None = None) -> Tensor:
    """input / sqrt(sum(input^2) + eps), row by row."""
    h = wide(input)
    return stored(h * torch.rsqrt(by_row(torch.sum, h.pow(2)) + eps), input, output_dtype)
