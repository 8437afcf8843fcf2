"""Where rows lie: the layout of several tensors against offsets that are counted out, and rows that are not aligned.

The grid: hypothesis chooses up to five leading dimensions, of any size and stride, for up to three tensors. The
examples are the same in every run.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import norm_plugin
from norm_plugin.native import rms
from tests.kernels import twins
from tests.kernels.device import DEVICE
from tests.kernels.twins import TRITON

WIDTH = 48
fixed = settings(
    derandomize=True, max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@st.composite
def strided(draw: st.DrawFn) -> list[Tensor]:
    """Tensors of one shape without memory, each with its own strides: dense in any order, with gaps, or repeated."""
    sizes = draw(st.lists(st.integers(1, 4), max_size=5))
    tensors = []
    for _ in range(draw(st.integers(1, 3))):
        order = draw(st.permutations(range(len(sizes))))
        strides, step = [0] * len(sizes), WIDTH + draw(st.sampled_from([0, 8, 1]))
        for dim in order:
            gap = draw(st.sampled_from([0, 0, 0, 1, 16]))
            strides[dim] = draw(st.sampled_from([step + gap, step + gap, step + gap, 0]))
            step = (step + gap) * sizes[dim]
        tensors.append(torch.empty_strided((*sizes, WIDTH), (*strides, 1), device="meta"))
    return tensors


def counted_out(t: Tensor, rows: int) -> list[int]:
    """The offsets of all rows in order, with `rows` in the first dimension: the sum of index times stride."""
    sizes = [rows, *t.shape[1:-1]] if t.dim() > 1 else []
    indices = itertools.product(*map(range, sizes))
    return [sum(i * s for i, s in zip(index, t.stride()[:-1], strict=True)) for index in indices]


def by_layout(found: Any, place: int, count: int) -> list[int]:
    """The same offsets from a layout, computed as row_start does."""
    (n1, n2), (s0, s1, s2) = found.sizes, found.strides[place]
    if found.levels == 1:
        return [row * s0 for row in range(count)]
    if found.levels == 2:
        return [row // n1 * s0 + row % n1 * s1 for row in range(count)]
    return [row // n2 // n1 * s0 + row // n2 % n1 * s1 + row % n2 * s2 for row in range(count)]


def levels_needed(tensors: Sequence[Tensor]) -> int:
    """One, and one more for each dimension that does not continue the next one."""
    shape = tensors[0].shape[:-1]
    kept = [dim for dim, size in enumerate(shape) if dim == 0 or size > 1]
    breaks = [
        any(t.stride(outer) != t.stride(inner) * shape[inner] for t in tensors)
        for outer, inner in itertools.pairwise(kept)
    ]
    return 1 + sum(breaks)


@given(strided())
@fixed
def test_a_layout_finds_every_row(tensors: list[Tensor]) -> None:
    """Also in batches of another size, because a launch depends on strides and not on the number of rows."""
    from norm_plugin.kernels.binding import layout

    found = layout([tensors[0], None, *tensors[1:]])
    needed = levels_needed(tensors)
    if found is None:
        assert needed > 3
        return
    assert found.levels == needed <= 3
    assert found.strides[1] == (None, None, None)
    for place, t in zip([0, *range(2, len(tensors) + 1)], tensors, strict=True):
        assert all((s is not None) == (level < found.levels) for level, s in enumerate(found.strides[place]))
        assert all(s % found.align == 0 for s in found.strides[place] if s is not None)
        for rows in (t.shape[0], 7) if t.dim() > 1 else (1,):
            expected = counted_out(t, rows)
            assert by_layout(found, place, len(expected)) == expected


@st.composite
def rows_in_memory(draw: st.DrawFn) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """(offset, sizes, strides) of rows somewhere in a buffer: aligned to 16 bytes, to fewer, or not at all."""
    sizes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    unit = draw(st.sampled_from([1, 2, 8, 16]))
    step, strides = -(-WIDTH // unit) * unit, [0] * len(sizes)
    for dim in draw(st.permutations(range(len(sizes)))):
        strides[dim] = step + unit * draw(st.integers(0, 2))
        step = strides[dim] * sizes[dim]
    return draw(st.sampled_from([0, unit])), tuple(sizes), tuple(strides)


@given(rows_in_memory(), rows_in_memory(), st.sampled_from([torch.bfloat16, torch.float32]))
@settings(fixed, max_examples=60)
def test_rows_anywhere_in_memory(x_at: Any, out_at: Any, dtype: torch.dtype) -> None:
    """x and out have one shape and unrelated strides. The result is right, and nothing else is written."""
    (start, sizes, strides), (out_start, _, _) = x_at, out_at
    buffer = torch.randn(4096, generator=torch.Generator().manual_seed(1)).to(dtype).to(DEVICE)
    x = buffer.as_strided((*sizes, WIDTH), (*strides, 1), start)
    out_buffer = torch.full_like(buffer, 7)
    out = out_buffer.as_strided((*sizes, WIDTH), (*strides, 1), out_start)
    for _ in range(2):
        norm_plugin.rmsnorm(x, None, out=out)
    written = torch.zeros_like(out_buffer)
    written.as_strided(out.shape, out.stride(), out_start).fill_(1)
    assert (out_buffer[written == 0] == 7).all()
    torch.testing.assert_close(out, rms.rmsnorm(x, None), rtol=2.0**-7 if dtype == torch.bfloat16 else 2.0**-20, atol=0)


def off_by_one(t: Tensor) -> Tensor:
    """The same values one element further than an aligned address."""
    buffer = t.new_zeros(t.numel() + 1)
    return buffer[1:].view(t.shape).copy_(t)


@pytest.mark.parametrize("moved", ["x", "residual", "weight", "all"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_addresses_that_are_not_aligned(dtype: torch.dtype, moved: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch that was made for aligned addresses is not used for others, before it and after it."""
    given = {"x": TRITON.make("normal", (4, 80), dtype, 1), "residual": TRITON.make("normal", (4, 80), dtype, 2)}
    given["weight"] = TRITON.weights(80, dtype)
    elsewhere = given | {name: off_by_one(given[name]) for name in given if moved in (name, "all")}
    assert any(t.data_ptr() % 16 for t in elsewhere.values())
    expected = norm_plugin.add_rmsnorm(*given.values())
    for tensors in (elsewhere, given, elsewhere):
        found = norm_plugin.add_rmsnorm(*tensors.values())
        assert all(twins.same_bits(*pair) for pair in zip(found, expected, strict=True))
    assert norm_plugin.dispatch.calls("add_rmsnorm", "triton") == 4
