"""No call changes what a later one does: an output is contiguous, whatever strides and rows came before.

A single row keeps the row stride of the wider tensor that it was cut from, so it has the signature of many rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import norm_plugin
from norm_plugin import layers
from norm_plugin.accuracy import inputs
from norm_plugin.ops import OPS
from tests.spec import judge
from tests.spec.backend import Backend

F8 = torch.float8_e4m3fn


def of_a_wider_one(backend: Backend, rows: int) -> Tensor:
    """Rows of 512 of 576 columns, such as DeepSeek's compressed key."""
    return backend.make("normal", (8, 576), torch.bfloat16, 1)[:rows, :512]


def weight(x: Tensor) -> Tensor:
    return inputs.weights(512, torch.bfloat16, device=x.device)


def differentiated(x: Tensor) -> Tensor:
    leaf = x.detach().requires_grad_()
    norm_plugin.rmsnorm(leaf, None).float().square().sum().backward()
    assert leaf.grad is not None
    return leaf.grad


#: Every function that returns tensors of x's shape, called on x.
CALLS: dict[str, Callable[[Tensor], Any]] = {
    "rmsnorm": lambda x: norm_plugin.rmsnorm(x, None),
    "gemma_rmsnorm": lambda x: norm_plugin.gemma_rmsnorm(x, weight(x)),
    "add_rmsnorm": lambda x: norm_plugin.add_rmsnorm(x, x, weight(x)),
    "l2norm": norm_plugin.l2norm,
    "layernorm": lambda x: norm_plugin.layernorm(x, weight(x), None),
    "layernorm_linear": lambda x: norm_plugin.layernorm_linear(x, None, None, weight(x).expand(3, 512), None),
    "layernorm_fn": lambda x: norm_plugin.layernorm_fn(x, None, None, x, group_size=64),
    "rmsnorm_fn": lambda x: norm_plugin.rmsnorm_fn(x, weight(x), None, x),
    "rmsnorm_dynamic_quant": lambda x: norm_plugin.rmsnorm_dynamic_quant(x, None),
    "rmsnorm_dynamic_quant, int8": lambda x: norm_plugin.rmsnorm_dynamic_quant(x, None, quant_dtype=torch.int8),
    "rmsnorm_block_quant": lambda x: norm_plugin.rmsnorm_block_quant(x, None, group_size=64),
    "rmsnorm_backward": differentiated,
    "layers.RMSNorm": lambda x: layers.RMSNorm(512, dtype=torch.bfloat16, device=x.device)(x),
}


def found(call: Callable[[Tensor], Any], x: Tensor) -> list[Tensor]:
    outputs = call(x)
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


@pytest.mark.parametrize("first", [0, 1, 2])
@pytest.mark.parametrize("name", CALLS)
def test_many_rows_after_few_of_the_same_signature(backend: Backend, name: str, first: int) -> None:
    expected = found(CALLS[name], of_a_wider_one(backend, 4).contiguous())
    found(CALLS[name], of_a_wider_one(backend, first))
    for rows in (4, 1):
        outputs = found(CALLS[name], of_a_wider_one(backend, rows))
        for ours, theirs in zip(outputs, expected, strict=True):
            assert ours.stride() == torch.empty(ours.shape).stride()
            assert torch.equal(ours.float(), theirs[:rows].float()), name


@pytest.mark.parametrize("dtype", [torch.int8, F8])
def test_quantised_rows_are_those_of_packed_ones(backend: Backend, dtype: torch.dtype) -> None:
    """Per token and per block: a slice, a transposed tensor, and one expanded row."""
    x = backend.make("normal", (6, 5, 128), torch.bfloat16)
    for laid_out in (x[:, :3], x.transpose(0, 1), x[:1].expand(4, 5, 128)):
        for call in (norm_plugin.rmsnorm_dynamic_quant, norm_plugin.rmsnorm_block_quant):
            packed, strided = (call(t, None, quant_dtype=dtype) for t in (laid_out.contiguous(), laid_out))
            for ours, theirs in zip(strided, packed, strict=True):
                assert torch.equal(ours.float(), theirs.float())


def test_the_rows_of_an_input_may_overlap(backend: Backend) -> None:
    """They are only read, so that is allowed."""
    rows = backend.make("normal", (10,), torch.float32).unfold(0, 8, 1)
    for name in ("rmsnorm", "layernorm", "rmsnorm_dynamic_quant"):
        a = backend.arguments(OPS[name], (3, 8), torch.float32) | {"input": rows}
        judge.check(OPS[name], a, backend.outputs(OPS[name], a))


def test_a_layer_of_a_permuted_tensor_can_be_viewed(backend: Backend) -> None:
    x = backend.make("normal", (3, 2, 8), torch.float32)
    ours, theirs = layers.LayerNorm(8, device=x.device), nn.LayerNorm(8, device=x.device)
    for t in (x.permute(1, 0, 2), x[:, :1], x[:1].permute(1, 0, 2)):
        assert ours(t).view(2, -1).shape == theirs(t.contiguous()).view(2, -1).shape
