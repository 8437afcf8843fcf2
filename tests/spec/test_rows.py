"""Rows in every op: each row is normalized alone, whatever its batch, its rank and its size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from norm_plugin.accuracy import inputs
from norm_plugin.op import Op
from norm_plugin.ops import OPS
from tests.spec import judge, samples
from tests.spec.backend import Backend

#: Around the sizes at which vectorised code, threads and tiles change.
BATCHES = (1, 2, 3, 31, 64, 65, 255, 256, 257)
CHOSEN = (0, 1, 2, 30, 63, 64, 254, 255, 256)
DTYPES = [torch.float16, torch.bfloat16, torch.float32]

every_case = pytest.mark.parametrize(("op", "variant"), samples.CASES, ids=samples.IDS)
every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())


def rows_of(op: Op, a: samples.Arguments, rows: slice | Tensor) -> samples.Arguments:
    """The same call on some of its rows."""
    return a | {name: a[name][rows] for name in samples.alike(op) if a[name] is not None}


def same_bits(one: Tensor, other: Tensor) -> bool:
    """torch.equal, but NaNs are equal, and fp8 can be compared."""
    return torch.equal(one.double().nan_to_num(nan=12345.0), other.double().nan_to_num(nan=12345.0))


@pytest.mark.parametrize(
    ("op", "variant", "width", "dtype"),
    [(op, variant, 80, torch.float32) for op, variant in samples.CASES]
    + [(op, {}, 1000, torch.bfloat16) for op in OPS.values()],
    ids=[*samples.IDS, *(f"{name}-wide" for name in OPS)],
)
def test_a_row_does_not_depend_on_its_batch(op: Op, variant: samples.Arguments, width: int, dtype: torch.dtype) -> None:
    """In fp32, where no rounding hides a last bit, and with rows that end in the middle of a vector. layernorm_linear
    only promises its bound in every batch, because the matrix product is PyTorch's."""
    a = samples.arguments(op, (max(BATCHES), width), dtype, **variant)
    whole = samples.outputs(op, a)
    slices = [slice(0, batch) for batch in BATCHES] + [slice(row, row + 1) for row in CHOSEN]
    for rows in slices:
        part = samples.outputs(op, rows_of(op, a, rows))
        if op.name == "layernorm_linear":
            judge.check(op, rows_of(op, a, rows), part)
        else:
            assert all(same_bits(x, y[rows]) for x, y in zip(part, whole, strict=True)), rows


@every_case
@pytest.mark.parametrize("name", inputs.SPOILED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_that_is_not_finite_spoils_no_other(
    backend: Backend, op: Op, variant: samples.Arguments, name: str, dtype: torch.dtype
) -> None:
    shape = (5, 48)
    spoiled = backend.arguments(op, shape, dtype, input_class=name, **variant)
    sound = backend.arguments(op, shape, dtype, input_class="normal", **variant)
    others = torch.arange(5) != inputs.spoiled_row(shape)
    for x, y in zip(backend.outputs(op, spoiled), backend.outputs(op, sound), strict=True):
        assert same_bits(x[others], y[others])
        assert x.dtype == torch.int8 or not same_bits(x, y)


@every_case
@pytest.mark.parametrize("shape", [(0, 48), (3, 0, 48), (0, 4, 3, 48)], ids=str)
def test_no_rows(backend: Backend, op: Op, variant: samples.Arguments, shape: tuple[int, ...]) -> None:
    a = backend.arguments(op, shape, torch.bfloat16, **variant)
    for place, output in enumerate(backend.outputs(op, a)):
        assert output.shape[:-1] == shape[:-1]
        assert output.dtype == judge.dtype_of(op, a, place)


@every_case
@pytest.mark.parametrize("shape", [(48,), (1, 48), (3, 5, 48), (2, 3, 5, 48), (5, 1), (1,)], ids=str)
def test_ranks_and_widths(backend: Backend, op: Op, variant: samples.Arguments, shape: tuple[int, ...]) -> None:
    a = backend.arguments(op, shape, torch.bfloat16, **variant)
    outputs = backend.outputs(op, a)
    judge.check(op, a, outputs)
    assert all(output.shape[:-1] == shape[:-1] for output in outputs)


@every_op
def test_long_rows(op: Op) -> None:
    """PyTorch spreads a single long row over threads. Such rows are right, and the same alone as with others."""
    a = samples.arguments(op, (2, 131072), torch.float32)
    outputs = samples.outputs(op, a)
    judge.check(op, a, outputs)
    for row in (0, 1):
        alone = samples.outputs(op, rows_of(op, a, slice(row, row + 1)))
        if op.name != "layernorm_linear":
            assert all(same_bits(x, y[row : row + 1]) for x, y in zip(alone, outputs, strict=True))


def test_every_op_has_variants() -> None:
    assert set(samples.VARIANTS) == set(OPS)
