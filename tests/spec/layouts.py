"""The same values in other memory. The last stride is always 1."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor


def contiguous(x: Tensor) -> Tensor:
    """Rows one after another."""
    return x.contiguous()


def padded(x: Tensor, pad: int = 8) -> Tensor:
    """Rows with unused memory between them."""
    buffer = x.new_full((*x.shape[:-1], x.shape[-1] + pad), 7)
    buffer[..., : x.shape[-1]] = x
    return buffer[..., : x.shape[-1]]


def qkv_slice(x: Tensor) -> Tensor:
    """The middle of a wider projection: [T, H, D] is the k of a fused qkv, [T, N] a middle block of columns."""
    if x.dim() < 2:
        return padded(x)
    tokens, row = x.shape[0], math.prod(x.shape[1:])
    buffer = x.new_full((tokens, 3 * row), 7)
    buffer[:, row : 2 * row] = x.reshape(tokens, row)
    return buffer[:, row : 2 * row].view(x.shape)


def transposed(x: Tensor) -> Tensor:
    """The first two of three or more dimensions in the other order in memory."""
    return x.transpose(0, 1).contiguous().transpose(0, 1) if x.dim() > 2 else padded(x, 16)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": contiguous,
    "padded": padded,
    "qkv_slice": qkv_slice,
    "transposed": transposed,
}


def each_different(*tensors: Tensor) -> list[Tensor]:
    """The same values, every tensor with strides of its own."""
    return [padded(x, 8 * (place + 1)) for place, x in enumerate(tensors)]
