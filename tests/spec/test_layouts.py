"""Any strides: values are right, outputs have the strides of torch.empty_like, and an op writes only what it says it
writes, not even the memory between rows.

The grid: every op in every variant x every layout x 3-D and 4-D. Each tensor of x's shape gets another layout, so that
no two tensors of a call have the same strides.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import norm_plugin
from norm_plugin.accuracy import inputs
from norm_plugin.op import Op
from norm_plugin.ops import OPS
from tests.spec import judge, layouts, samples
from tests.spec.backend import Backend

SHAPES = [(4, 3, 48), (2, 3, 5, 48), (5, 48), (1, 3, 1, 48)]
GAP = 7.0
DYNAMIC = ["rmsnorm_dynamic_quant", "rmsnorm_block_quant"]


def expanded(x: Tensor) -> Tensor:
    """Every row is the first one, without a copy."""
    return x.flatten(0, -2)[0].expand(x.shape)


def every_second(x: Tensor) -> Tensor:
    """A last stride of 2."""
    return torch.stack([x, x], -1).flatten(-2)[..., ::2]


def backwards(x: Tensor) -> Tensor:
    """The dimensions in reverse order in memory."""
    order = list(reversed(range(x.dim())))
    return x.permute(order).contiguous().permute(order)


READ: dict[str, Callable[[Tensor], Tensor]] = layouts.LAYOUTS | {
    "expanded": expanded,
    "every_second": every_second,
    "backwards": backwards,
}

every_case = pytest.mark.parametrize(("op", "variant"), samples.CASES, ids=samples.IDS)
every_shape = pytest.mark.parametrize("shape", SHAPES[:2], ids=str)


def laid_out(op: Op, a: samples.Arguments, layout: Callable[[Tensor], Tensor]) -> samples.Arguments:
    """The call with x in a layout, and other tensors of rows with other paddings."""
    x, *others = [name for name in samples.alike(op) if a[name] is not None]
    written = samples.written(op, a)
    first = layouts.padded(a[x], 24) if x in written and layout not in layouts.LAYOUTS.values() else layout(a[x])
    return a | {x: first} | dict(zip(others, layouts.each_different(*(a[name] for name in others)), strict=True))


def values(a: samples.Arguments) -> dict[str, Tensor]:
    """Copies of all tensors of a call."""
    return {name: value.clone() for name, value in a.items() if isinstance(value, Tensor)}


@every_case
@pytest.mark.parametrize("layout", READ.values(), ids=READ.keys())
@every_shape
def test_right_in_every_layout(
    backend: Backend, op: Op, variant: samples.Arguments, layout: Callable[[Tensor], Tensor], shape: tuple[int, ...]
) -> None:
    a = laid_out(op, backend.arguments(op, shape, torch.bfloat16, **variant), layout)
    judge.check(op, a, backend.outputs(op, a))


@pytest.mark.parametrize(
    "name", ["rmsnorm", "add_rmsnorm", "l2norm", "layernorm", "gated_norm", "split_rmsnorm", *DYNAMIC]
)
@pytest.mark.parametrize("layout", READ.values(), ids=READ.keys())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (0, 48), (3, 0, 48), (5, 1), (1, 1, 1)], ids=str)
def test_outputs_are_contiguous(
    backend: Backend, name: str, layout: Callable[[Tensor], Tensor], dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    if 0 in shape and layout is expanded:
        layout = layouts.padded  # there is no first row
    op = OPS[name]
    for variant in samples.VARIANTS[name]:
        a = laid_out(op, backend.arguments(op, shape, dtype, **variant), layout)
        first, *others = backend.outputs(op, a)
        for output in (first, *others[:1]):  # not a residual, which keeps its strides
            assert output.stride() == torch.empty(output.shape).stride(), variant


@every_case
@pytest.mark.parametrize("layout", layouts.LAYOUTS.values(), ids=layouts.LAYOUTS.keys())
@every_shape
def test_only_what_is_written_changes(
    backend: Backend, op: Op, variant: samples.Arguments, layout: Callable[[Tensor], Tensor], shape: tuple[int, ...]
) -> None:
    a = laid_out(op, backend.arguments(op, shape, torch.bfloat16, **variant), layout)
    before, expected = values(a), backend.outputs(op, a)
    returned = backend.call(op, a, through_torch=True)
    written = samples.written(op, a)
    for name, value in before.items():
        same = torch.equal(value.float(), a[name].float())
        assert same != (name in written), name
    count = 0 if returned is None else 1 if isinstance(returned, Tensor) else len(returned)
    for name, value in zip(written, expected[count:], strict=True):
        assert torch.equal(a[name].float(), value.float())


@pytest.mark.parametrize(
    "name", ["rmsnorm_out", "fused_add_rmsnorm", "rmsnorm_quant", "fused_add_rmsnorm_quant", "layernorm_quant"]
)
def test_the_memory_between_rows_stays(backend: Backend, name: str) -> None:
    op = OPS[name]
    a = backend.arguments(op, (4, 48), torch.bfloat16)
    buffers = {}
    for place, written in enumerate(samples.written(op, a)):
        buffers[written] = torch.full((4, 48 + 8 * (place + 1)), GAP).to(a[written])
        buffers[written][:, :48] = a[written]
        a[written] = buffers[written][:, :48]
    backend.call(op, a, through_torch=True)
    assert all((buffer[:, 48:].float() == GAP).all() for buffer in buffers.values())


@pytest.mark.parametrize("layout", layouts.LAYOUTS.values(), ids=layouts.LAYOUTS.keys())
@pytest.mark.parametrize("function", [norm_plugin.rmsnorm, norm_plugin.gemma_rmsnorm])
def test_out_may_be_the_input(
    backend: Backend, function: Callable[..., Tensor], layout: Callable[[Tensor], Tensor]
) -> None:
    x, weight = layout(backend.make("normal", (4, 3, 48), torch.bfloat16)), backend.weights(48, torch.bfloat16)
    expected = function(x, weight)
    assert function(x, weight, out=x) is x
    assert torch.equal(x, expected)


def test_the_in_place_functions_write_both_tensors(backend: Backend) -> None:
    for function, gemma in ((norm_plugin.fused_add_rmsnorm, False), (norm_plugin.gemma_fused_add_rmsnorm, True)):
        x, residual = (backend.make("normal", (4, 48), torch.bfloat16, seed) for seed in (1, 2))
        weight = backend.weights(48, torch.bfloat16)
        out, new_residual = norm_plugin.add_rmsnorm(x, residual, weight, gemma=gemma)
        assert function(x, residual, weight) is None
        assert torch.equal(x, out)
        assert torch.equal(residual, new_residual)


def test_a_weight_may_be_strided() -> None:
    x, wide = inputs.make("normal", (4, 48), torch.bfloat16), inputs.weights(96, torch.bfloat16)
    assert torch.equal(norm_plugin.rmsnorm(x, wide[::2]), norm_plugin.rmsnorm(x, wide[::2].contiguous()))
