"""Tensors whose values memory does not have as they are. (refused.py has the refused ones.)"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import norm_plugin
from norm_plugin import dispatch, settings
from norm_plugin.accuracy import inputs
from tests.spec.backend import Backend
from tests.spec.refused import with_negative_bit

BF16 = torch.bfloat16


def test_the_negative_bit_is_heard(backend: Backend) -> None:
    x = backend.make("normal", (4, 48), torch.float32)
    residual = backend.make("normal", (4, 48), torch.float32, 2)
    for _ in range(2):
        assert torch.equal(norm_plugin.rmsnorm(with_negative_bit(x), None), norm_plugin.rmsnorm(-x, None))
        norm_plugin.rmsnorm(x, None)  # the same signature, but for the bit
    expected = norm_plugin.add_rmsnorm(-x, residual, None)
    out = torch.empty_like(x)
    norm_plugin.rmsnorm(with_negative_bit(x), None, out=out)
    assert torch.equal(out, norm_plugin.rmsnorm(-x, None))
    assert torch.equal(norm_plugin.add_rmsnorm(with_negative_bit(x), residual, None)[0], expected[0])


def test_lazy_zeros_are_zeros() -> None:
    zeros = torch._efficientzerotensor((4, 48), device=inputs.make("normal", (1, 1), BF16).device)
    assert torch.equal(norm_plugin.rmsnorm(zeros, None), torch.zeros_like(norm_plugin.rmsnorm(zeros, None)))


@pytest.mark.parametrize("asked", ["auto", "triton", "native"])
def test_a_meta_tensor_leaves_nothing_behind(backend: Backend, asked: str) -> None:
    """It has a shape and no values. Later calls on real tensors run as if it had never been there."""
    x = backend.make("normal", (4, 48), torch.float32)
    with settings.override(backend=asked, strict=False):
        before = norm_plugin.rmsnorm(x, None)
        where = {route.backend for route in dispatch.routes()}
    with settings.override(backend=asked, strict=False):
        for shape in ((4, 48), (0, 48)):
            meta = torch.empty(shape, device="meta")
            assert norm_plugin.rmsnorm(meta, None).shape == shape
            norm_plugin.fused_add_rmsnorm(meta, torch.empty_like(meta), None)
        assert torch.equal(norm_plugin.rmsnorm(x, None), before)
        assert {route.backend for route in dispatch.routes()} == where


def test_autocast_changes_no_dtype(backend: Backend) -> None:
    """It does not reach an op in compiled code, so an eager op ignores it too."""
    x, weight = backend.make("normal", (4, 48), torch.float32), backend.make("normal", (5, 48), torch.float32)

    def call(x: Tensor) -> Tensor:
        return norm_plugin.layernorm_linear(x, None, None, weight, None)

    with torch.autocast(x.device.type, dtype=BF16):
        eager, compiled = call(x), torch.compile(call, backend="aot_eager", fullgraph=True)(x)
    assert eager.dtype == compiled.dtype == torch.float32
    assert torch.equal(eager, call(x))
    leaf = x.clone().requires_grad_()
    call(leaf).square().sum().backward()
    expected = leaf.grad
    leaf = x.clone().requires_grad_()
    with torch.autocast(x.device.type, dtype=BF16):
        call(leaf).square().sum().backward()
    assert leaf.grad is not None
    assert expected is not None
    assert torch.equal(leaf.grad, expected)


def test_gemma_without_a_weight_scales_by_nothing(backend: Backend) -> None:
    x = backend.make("normal", (4, 48), BF16)
    assert torch.equal(norm_plugin.gemma_rmsnorm(x, None), norm_plugin.rmsnorm(x, None))
