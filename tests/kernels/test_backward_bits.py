"""The bits of the backward kernels depend on nothing but the values of their inputs: not on layouts, on other rows, on
an earlier call or on a graph; and recording gradients changes none of the forward.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from norm_plugin import dispatch
from norm_plugin.gradients import BACKWARD_OPS
from norm_plugin.ops import OPS
from tests.kernels import twins
from tests.kernels.backward_calls import (
    arguments,
    every_kind,
    few_kinds,
    forced,
    gradients,
    incoming,
    listed,
)
from tests.kernels.device import COMPILED, on_a_gpu
from tests.kernels.twins import TRITON
from tests.spec import layouts, samples, test_gradients
from tests.spec.test_layouts import READ


@pytest.mark.parametrize("layout", READ.values(), ids=READ.keys())
@pytest.mark.parametrize("name", ["add_rmsnorm", "layernorm", "gated_norm"])
def test_incoming_gradients_in_every_layout(name: str, layout: Callable[[Tensor], Tensor]) -> None:
    """They run on the kernel, whatever autograd sends, and give the bits of contiguous ones."""
    shape = (2, 3, 5, 48)
    a = TRITON.arguments(OPS[name], shape, torch.bfloat16)
    grads = [layout(g) for g in incoming(name, shape, torch.bfloat16)]
    ours, plain = gradients(name, a, *grads), gradients(name, a, *(g.contiguous() for g in grads))
    assert all(twins.same_bits(ours[key], plain[key]) for key in ours)


@pytest.mark.parametrize("layout", layouts.LAYOUTS.values(), ids=layouts.LAYOUTS.keys())
@pytest.mark.parametrize("name", ["rmsnorm", "layernorm", "gated_norm"])
def test_rows_in_every_layout(name: str, layout: Callable[[Tensor], Tensor]) -> None:
    """The q of a fused qkv is differentiated where it lies."""
    op = BACKWARD_OPS[f"{name}_backward"]
    dense = arguments(op, (4, 3, 48))
    laid = dense | {key: layout(dense[key]) for key in ("input", "x", "z", "grad") if dense.get(key) is not None}
    for one, other in zip(listed(op, laid), listed(op, dense), strict=True):
        assert twins.same_bits(one, other)


@few_kinds
@pytest.mark.parametrize("entry", [(1, 1, 1, 1), (1, 4, 1, 1), ()], ids=str)
def test_a_row_does_not_depend_on_its_batch(name: str, variant: samples.Arguments, entry: tuple[int, ...]) -> None:
    """The gradient of x and of what goes with it; a weight's is a sum over the rows."""
    op, many = OPS[name], 37 if COMPILED else 7
    a = TRITON.arguments(op, (many, 80), torch.bfloat16, **variant)
    grads = incoming(name, (many, 80), torch.bfloat16)
    with forced(entry):
        whole = gradients(name, a, *grads)
        for rows in (slice(0, 1), slice(many - 1, many), slice(0, 5)):
            part = {key: a[key][rows] for key in samples.alike(op) if a[key] is not None}
            found = gradients(name, a | part, *(g[rows] for g in grads))
            assert all(twins.same_bits(found[key], whole[key][rows]) for key in part if key in found)


@few_kinds
def test_the_same_bits_again(name: str, variant: samples.Arguments) -> None:
    a = TRITON.arguments(OPS[name], (513 if COMPILED else 17, 80), torch.bfloat16, **variant)
    grads = incoming(name, (513 if COMPILED else 17, 80), torch.bfloat16)
    first = gradients(name, a, *grads)
    for _ in range(20 if COMPILED else 2):
        again = gradients(name, a, *grads)
        assert all(twins.same_bits(again[key], first[key]) for key in first)


@every_kind
def test_training_changes_no_bit_of_the_forward(name: str, variant: samples.Arguments) -> None:
    """One kernel, whether gradients are recorded or not."""
    a = TRITON.arguments(OPS[name], (9, 1000), torch.bfloat16, **variant)
    recorded = test_gradients.function_of(name, a)(*test_gradients.leaves(a).values())
    with torch.no_grad():
        plain = test_gradients.function_of(name, a)(*(t.detach() for t in test_gradients.leaves(a).values()))
    pairs = zip(*((t,) if isinstance(t, Tensor) else t for t in (recorded, plain)), strict=True)
    assert all(twins.same_bits(one.detach(), other) for one, other in pairs)
    assert dispatch.calls(name, "triton") == 2


@on_a_gpu
@pytest.mark.parametrize("name", ["rmsnorm", "layernorm", "gated_norm"])
def test_in_a_cuda_graph(name: str) -> None:
    op = BACKWARD_OPS[f"{name}_backward"]
    a = arguments(op, (257, 2048))
    expected = listed(op, a)
    listed(op, a)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = listed(op, a)
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert all(twins.same_bits(*pair) for pair in zip(found, expected, strict=True))
