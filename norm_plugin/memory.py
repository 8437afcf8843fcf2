"""Which bytes a tensor covers: whether two tensors share bytes, and whether one tensor covers a byte twice.

A tensor is a set of runs: elements that lie side by side, such as the rows of a tensor whose last stride is 1. For
nearly every pair of tensors the answer follows from where they begin and end, or from runs that lie between the runs of
the other. The remaining pairs are compared run by run. All answers are exact, and no tensor's memory is read.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: (size, stride in bytes) of each dimension that has more than one element, the smallest stride first.
Dimensions = list[tuple[int, int]]


def _runs(shape: list[int], strides: list[int], itemsize: int) -> tuple[int, Dimensions]:
    """The bytes of one run, and the dimensions that the runs form."""
    run = itemsize
    dimensions = [(size, stride * itemsize) for size, stride in zip(shape, strides, strict=True) if size > 1]
    dimensions.sort(key=lambda dimension: dimension[1])
    while dimensions and dimensions[0][1] == run:
        run *= dimensions.pop(0)[0]
    return run, dimensions


def span(t: Tensor) -> tuple[int, int]:
    """The address of the first byte, and the one after the last; equal for an empty tensor."""
    first = t.data_ptr()
    if t.numel() == 0:
        return first, first
    reach = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return first, first + (reach + 1) * t.element_size()


def _starts(first: int, dimensions: Dimensions) -> Tensor:
    """The addresses of all runs, in order."""
    found = torch.tensor([first])
    for size, stride in dimensions:
        found = (found[:, None] + torch.arange(size) * stride).flatten()
    return found.sort().values


def covers_itself(t: Tensor) -> bool:
    """Whether two elements of `t` share memory."""
    return t.numel() > 1 and _covers_itself(*_runs(list(t.shape), list(t.stride()), t.element_size()))


def _covers_itself(run: int, dimensions: Dimensions) -> bool:
    extent = run
    for size, stride in dimensions:
        if stride < extent:
            break
        extent += (size - 1) * stride
    else:
        return False
    return bool((_starts(0, dimensions).diff() < run).any())


def may_cover_itself(t: Tensor) -> bool:
    """Whether a tensor with these strides and inner sizes, and any number of rows, may cover itself."""
    if t.dim() < 2 or 0 in t.shape[1:]:
        return covers_itself(t)
    inner = _runs(list(t.shape[1:]), list(t.stride()[1:]), t.element_size())
    return t.stride(0) * t.element_size() < bytes_of_a_row(t) or _covers_itself(*inner)


def bytes_of_a_row(t: Tensor) -> int:
    """The bytes from the first to the last element of one entry of the first dimension."""
    reach = sum((size - 1) * stride for size, stride in zip(t.shape[1:], t.stride()[1:], strict=True))
    return (reach + 1) * t.element_size()


def packed(t: Tensor) -> bool:
    """Whether t has the strides of a contiguous tensor, also in dimensions of size 1, whatever its number of rows."""
    expected = 1
    for size, stride in zip(reversed(t.shape), reversed(t.stride()), strict=True):
        if stride != expected:
            return False
        expected *= max(size, 1)
    return True


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether an element of `a` and one of `b` share memory."""
    (a_first, a_end), (b_first, b_end) = span(a), span(b)
    if a_first == a_end or b_first == b_end or a_end <= b_first or b_end <= a_first:
        return False
    a_run, a_dimensions = _runs(list(a.shape), list(a.stride()), a.element_size())
    b_run, b_dimensions = _runs(list(b.shape), list(b.stride()), b.element_size())
    strides = {stride for _, stride in a_dimensions + b_dimensions}
    if len(a_dimensions) < 2 and len(b_dimensions) < 2 and len(strides) == 1 and 0 not in strides:
        (stride,) = strides
        offset = (b_first - a_first) % stride
        if a_run <= stride and a_run <= offset and offset + b_run <= stride:
            return False  # such as two slices of columns of one tensor
    a_starts, b_starts = _starts(a_first, a_dimensions), _starts(b_first, b_dimensions)
    following = torch.searchsorted(a_starts, b_starts - a_run, right=True)
    there = following < len(a_starts)
    return bool((a_starts[following[there]] < b_starts[there] + b_run).any())


def same_strides(a: Tensor, b: Tensor) -> bool:
    """Whether tensors of one shape, with any first size, have the same layout."""
    inner = zip(a.shape[1:], a.stride()[1:], b.stride()[1:], strict=True)
    return a.dtype == b.dtype and a.stride()[:1] == b.stride()[:1] and all(n < 2 or s == t for n, s, t in inner)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether each element of `a` and its counterpart in `b` are the same memory."""
    strides = zip(a.shape, a.stride(), b.stride(), strict=True)
    return (
        a.data_ptr() == b.data_ptr()
        and a.dtype == b.dtype
        and a.shape == b.shape
        and all(size < 2 or s == t for size, s, t in strides)
    )
