"""Ops that write find everything that is wrong before the first element is written, and autograd notices writes.

The grid: every op that writes x every pair of its tensors that could share memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import norm_plugin
from norm_plugin import dispatch, memory
from norm_plugin.op import Op
from norm_plugin.ops import OPS
from tests.spec.backend import Backend

SHAPE = (4, 64)
WRITING = [op for op in OPS.values() if op.written]


def made(backend: Backend, shape: tuple[int, ...] = SHAPE, seed: int = 1) -> Tensor:
    return backend.make("normal", shape, torch.float32, seed)


# --- which memory a tensor covers ---------------------------------------------------------------------------------


@st.composite
def strided(draw: st.DrawFn) -> Tensor:
    """A small view of one buffer of bytes, with any strides and one of several dtypes."""
    dtype = draw(st.sampled_from([torch.int8, torch.int16]))
    shape = draw(st.lists(st.integers(0, 4), min_size=1, max_size=3))
    stride = draw(st.lists(st.integers(0, 9), min_size=len(shape), max_size=len(shape)))
    offset = draw(st.integers(0, 20))
    return BUFFER.view(dtype).as_strided(shape, stride, offset)


BUFFER = torch.zeros(512, dtype=torch.int8)


def bytes_of(t: Tensor) -> list[int]:
    """The bytes that each element covers, one element after another."""
    first = t.data_ptr() - BUFFER.data_ptr()
    covered = []
    for index in itertools.product(*map(range, t.shape)):
        at = first + sum(i * s for i, s in zip(index, t.stride(), strict=True)) * t.element_size()
        covered += range(at, at + t.element_size())
    return covered


@settings(max_examples=300, deadline=None)
@given(strided(), strided())
def test_overlap_is_what_the_bytes_say(a: Tensor, b: Tensor) -> None:
    assert memory.overlap(a, b) == bool(set(bytes_of(a)) & set(bytes_of(b)))
    assert memory.covers_itself(a) == (len(set(bytes_of(a))) < len(bytes_of(a)))
    if a.dim() > 1 and a.numel() and not memory.may_cover_itself(a):
        assert not memory.covers_itself(BUFFER.view(a.dtype).as_strided((5, *a.shape[1:]), a.stride(), 0))


# --- overlaps -----------------------------------------------------------------------------------------------------


def partly_over(t: Tensor) -> tuple[Tensor, Tensor]:
    """A copy of t, and a tensor of the same shape and dtype that begins in the middle of the copy."""
    buffer = t.new_empty(2 * t.numel())
    first, second = buffer[: t.numel()].view(t.shape), buffer[t.numel() // 2 :][: t.numel()].view(t.shape)
    second.copy_(t)
    first.copy_(t)
    return first, second


PAIRS = [
    (op, op.arguments[i], op.arguments[j])
    for op in WRITING
    for i, j in op.pairs
    if op.arguments[j] in ("input", "residual", "out")
]


def over_each_other(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Two tensors like these, with their values. The first begins in the middle of the second, or lies inside it if its
    elements are smaller."""
    if one.dtype == other.dtype:
        second, first = partly_over(other)
        return first, second
    whole = other.clone()
    return whole.view(torch.uint8).flatten()[: one.numel()].view(one.dtype).view(one.shape), whole


def bits(t: Tensor) -> Tensor:
    return t.detach().reshape(-1).view(torch.uint8).clone()


@pytest.mark.parametrize(("op", "one", "other"), PAIRS, ids=[f"{op.name}: {a}, {b}" for op, a, b in PAIRS])
def test_tensors_that_overlap_in_part_are_refused(backend: Backend, op: Op, one: str, other: str) -> None:
    a = backend.arguments(op, SHAPE, torch.float32, **({"group_size": 16} if "group_size" in op.arguments else {}))
    dispatch.call(op, *a.values())  # a right call of the same signature
    a[one], a[other] = over_each_other(a[one], a[other])
    before = {name: bits(value) for name, value in a.items() if isinstance(value, Tensor)}
    with pytest.raises(ValueError, match=r"overlap in memory, and .* written; clone one of them"):
        dispatch.call(op, *a.values())
    assert all(torch.equal(value, bits(a[name])) for name, value in before.items())


def test_columns_of_one_tensor_do_not_overlap(backend: Backend) -> None:
    """As in a fused projection, where the rows of one lie between the rows of the other."""
    buffer = made(backend, (4, 192))
    x, residual = buffer[:, :64], buffer[:, 64:128]
    expected = norm_plugin.add_rmsnorm(x.clone(), residual.clone(), None)
    for _ in range(2):
        buffer.copy_(made(backend, (4, 192)))
        kept = buffer[:, 128:].clone()
        norm_plugin.fused_add_rmsnorm(x, residual, None)
        assert torch.equal(x, expected[0])
        assert torch.equal(residual, expected[1])
        assert torch.equal(buffer[:, 128:], kept)


def test_one_row_may_lie_where_many_would_not(backend: Backend) -> None:
    """The strides of a single row do not matter; those of more rows do."""
    buffer = made(backend, (8 * 64,))
    for rows in (1, 4, 1):
        x = buffer.as_strided((rows, 64), (32, 1))
        if rows > 1:
            with pytest.raises(ValueError, match="some of its elements are the same memory"):
                norm_plugin.rmsnorm(made(backend, (rows, 64)), None, out=x)
        else:
            norm_plugin.rmsnorm(made(backend, (rows, 64)), None, out=x)


def test_a_call_without_rows_after_one_with_rows(backend: Backend) -> None:
    """It may be the first call that makes a plan, for a signature that torch.ops has proven."""
    torch.ops.norm_plugin.fused_add_rmsnorm(made(backend), made(backend, seed=2), None)
    for rows in (0, 4, 0):
        norm_plugin.fused_add_rmsnorm(made(backend, (rows, 64)), made(backend, (rows, 64), 2), None)


def test_out_may_be_the_input_and_nothing_near_it(backend: Backend) -> None:
    buffer = made(backend, (6, 64))
    x = buffer[:4]
    expected = norm_plugin.rmsnorm(x.clone(), None)
    with pytest.raises(ValueError, match="out and input overlap in memory, and out is written"):
        norm_plugin.rmsnorm(x, None, out=buffer[1:5])
    with pytest.raises(ValueError, match="out and input overlap in memory"):
        norm_plugin.rmsnorm(
            x,
            None,
            out=buffer.view(2, 3, 64)
            .transpose(0, 1)
            .reshape(6, 64)
            .set_(buffer.untyped_storage(), 0, (4, 64), (65, 1)),
        )
    assert norm_plugin.rmsnorm(x, None, out=x) is x
    assert torch.equal(x, expected)


# --- autograd notices ---------------------------------------------------------------------------------------------


def after(backend: Backend, write: Callable[[Tensor, Tensor], Any]) -> tuple[int, int]:
    """By how much `write` advances the versions of two tensors."""
    x, residual = made(backend), made(backend, seed=2)
    write(x, residual)
    begin = x._version, residual._version
    write(x, residual)
    return x._version - begin[0], residual._version - begin[1]


F8 = torch.float8_e4m3fn

WRITES: dict[str, tuple[Callable[[Tensor, Tensor], Any], tuple[bool, bool]]] = {
    "fused_add_rmsnorm": (lambda x, r: norm_plugin.fused_add_rmsnorm(x, r, None), (True, True)),
    "through torch.ops": (lambda x, r: torch.ops.norm_plugin.fused_add_rmsnorm(x, r, None), (True, True)),
    "out": (lambda x, r: norm_plugin.rmsnorm(x, None, out=r), (False, True)),
    "a quantised residual": (lambda x, r: norm_plugin.rmsnorm_dynamic_quant(x, None, r), (False, True)),
    "a quantised residual in blocks": (
        lambda x, r: norm_plugin.rmsnorm_block_quant(x, None, r, group_size=16), (False, True),
    ),
    "nothing": (lambda x, r: norm_plugin.add_rmsnorm(x, r, None), (False, False)),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITES)
def test_the_version_of_what_is_written_advances(backend: Backend, name: str) -> None:
    write, expected = WRITES[name]
    assert tuple(advance > 0 for advance in after(backend, write)) == expected


def test_autograd_refuses_a_tensor_that_was_written_since(backend: Backend) -> None:
    y, residual = made(backend), made(backend, seed=2)
    for _ in range(2):
        q = y.clone().requires_grad_()
        product = (q * y).sum()
        norm_plugin.fused_add_rmsnorm(y, residual, None)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()


# --- what torch lets be written only in some modes ----------------------------------------------------------------


def inference_tensor(backend: Backend) -> Tensor:
    with torch.inference_mode():
        return made(backend)


def test_an_inference_tensor_is_written_in_inference_mode(backend: Backend) -> None:
    x, residual = inference_tensor(backend), inference_tensor(backend)
    expected = norm_plugin.add_rmsnorm(x, residual, None)
    with torch.inference_mode():
        norm_plugin.fused_add_rmsnorm(x, residual, None)
    assert torch.equal(x, expected[0])
    assert torch.equal(residual, expected[1])


def test_a_quantised_residual_is_written_where_no_gradient_is_recorded(backend: Backend) -> None:
    residual = made(backend, seed=2).requires_grad_() * 1
    with torch.no_grad():
        expected = norm_plugin.add_rmsnorm(made(backend), residual, None)[1]
        norm_plugin.rmsnorm_dynamic_quant(made(backend), None, residual)
    assert torch.equal(residual, expected)
