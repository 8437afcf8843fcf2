"""Offsets beyond 32 bits: strides that reach further than 2^31 elements, and tensors of more elements than that.

The grid: every op x strides, for rows in one dimension and in two; on a GPU also every op x widths for each sort of
launch (several rows a program, one row, rows that are read again). With large strides only the rows are touched, so the
memory between them need not exist. The truth is the same call on rows that lie together, which agrees with the native
twin.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from norm_plugin.op import Op
from norm_plugin.ops import OPS
from tests.kernels import twins
from tests.kernels.device import on_a_gpu
from tests.kernels.test_invariance import NAMES, all_equal, batch
from tests.kernels.test_widths import VARIANTS, at
from tests.kernels.twins import TRITON
from tests.spec import samples

pytestmark = pytest.mark.alone

BF16 = torch.bfloat16
LIMIT = 2**31
WIDTH = 80

#: (rows, stride): a stride of more than 32 bits, and one whose product with a row number has more.
FAR = [(2, LIMIT + 16), (3, LIMIT // 2 + 16)]


@pytest.fixture(autouse=True)
def _room() -> Iterator[None]:
    """Empties the allocator: what one test leaves there is too small for the next test, and too large to keep."""
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def far_apart(t: Tensor, stride: int) -> Tensor:
    """The same values, with this stride of the first dimension."""
    far = torch.empty_strided(t.shape, (stride, *t.stride()[1:]), dtype=t.dtype, device=t.device)
    return far.copy_(t)


@pytest.mark.parametrize(("rows", "stride"), FAR)
@pytest.mark.parametrize("heads", [None, 2], ids=["rows", "heads"])
@pytest.mark.parametrize("name", NAMES)
def test_strides_beyond_32_bits(name: str, heads: int | None, rows: int, stride: int) -> None:
    """A stride of its own for every tensor."""
    op = OPS[name]
    a = TRITON.arguments(op, (rows, WIDTH) if heads is None else (rows, heads, WIDTH), BF16, **VARIANTS[name][0])
    expected = TRITON.outputs(op, a)
    for place, key in enumerate(samples.alike(op)):
        if a[key] is not None:
            a[key] = far_apart(a[key], stride + 16 * place)
    assert all_equal(twins.uncompared(op, a), expected)


def some(op: Op, a: samples.Arguments, rows: slice) -> samples.Arguments:
    """The same call on a few of its rows, which are copied."""
    return a | {name: a[name][rows].clone() for name in samples.alike(op) if a[name] is not None}


@on_a_gpu
@pytest.mark.parametrize("width", [64, 8192, 131072])
@pytest.mark.parametrize("name", NAMES)
def test_more_elements_than_32_bits_count(name: str, width: int) -> None:
    """The first rows, the last ones, and those around the element number 2^31."""
    op = OPS[name]
    middle = LIMIT // width
    a = batch(op, at(op, VARIANTS[name][0], width), middle + 70, width, BF16)
    parts = [slice(0, 3), slice(middle - 2, middle + 3), slice(middle + 67, middle + 70)]
    expected = [TRITON.outputs(op, some(op, a, rows)) for rows in parts]
    whole = whole_outputs(op, a)
    for rows, part in zip(parts, expected, strict=True):
        assert all_equal(tuple(t[rows] for t in whole), part), f"rows {rows}"


def whole_outputs(op: Op, a: samples.Arguments) -> tuple[Tensor, ...]:
    """What is returned, then what is written, in place: no copies of large tensors."""
    returned = TRITON.call(op, a)
    returned = (returned,) if isinstance(returned, Tensor) else returned or ()
    return *returned, *(a[name] for name in samples.written(op, a))
