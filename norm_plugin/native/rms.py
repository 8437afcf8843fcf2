"""RMSNorm, its fused residual add, Gemma's variant and the l2 norm, in plain PyTorch: the specification.

`enable_pdl` is for kernels and has no effect here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from norm_plugin import memory
from norm_plugin.numerics import FP32, NUMERICS, Numerics

#: From so many elements on, PyTorch spreads a sum over the threads of a CPU.
SUMMED_IN_PARTS = 32768


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of all arithmetic: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def wide(x: Tensor) -> Tensor:
    """x in the dtype of all arithmetic."""
    return x.to(wide_dtype(x.dtype))


#: An output with a tensor's shape, and its dtype unless another is given. It is always contiguous: a single row of a
#: wider tensor has strides that would be wrong for the output of the next call.
new_output = partial(torch.empty_like, memory_format=torch.contiguous_format)


def maker_of_outputs(like: Tensor) -> Callable[..., Tensor]:
    """The quickest new_output for tensors of this signature."""
    return torch.empty_like if memory.packed(like) else new_output


def stored(y: Tensor, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """y as a contiguous output in `dtype`, or in the dtype of `like`."""
    out = new_output(like, dtype=dtype)
    return y if y.dtype == out.dtype and y.stride() == out.stride() else out.copy_(y)


def reduce_rows(reduce: Callable[..., Tensor], h: Tensor) -> Tensor:
    """reduce(h) of each row, [..., 1], with the same bits in any batch. On a CPU PyTorch sums a single long row in
    parts, one for each thread; beside a copy of itself, the row is summed as in a batch."""
    if h.shape[-1] < SUMMED_IN_PARTS or h.numel() != h.shape[-1]:
        return reduce(h, -1, keepdim=True)
    return reduce(h.expand(2, *h.shape), -1, keepdim=True)[0]


def inverse_rms(h: Tensor, eps: float, variance_size: int | None = None) -> Tensor:
    """rsqrt(mean(h^2) + eps) of each row, or of its first `variance_size` columns."""
    return torch.rsqrt(reduce_rows(torch.mean, h[..., :variance_size].pow(2)) + eps)


def scaled(h: Tensor, s: Tensor, weight: Tensor | None, numerics: Numerics, gemma: bool, dtype: torch.dtype) -> Tensor:
    """h * s * w before its last rounding; b() rounds to `dtype`."""
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
    """(h, s, new_residual) of a fused add: h * s is the norm, and new_residual is written back."""
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
    """(norm(input + residual), input + residual): the fused add, with nothing written in place."""
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
    return stored(h * torch.rsqrt(reduce_rows(torch.sum, h.pow(2)) + eps), input, output_dtype)
