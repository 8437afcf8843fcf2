"""Functions whose gradient is made of several ops, on the kernels: all of them run there, in both directions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import norm_plugin
from norm_plugin import dispatch
from norm_plugin.compat.triton_transformer import layernorm
from tests.kernels.twins import TRITON

SHAPE = (4, 200)

#: Public function -> its call on x, r, z, weight and bias; tensors that it writes are copies.
PUBLIC: dict[str, Callable[..., Any]] = {
    "rmsnorm": lambda x, r, z, w, b: norm_plugin.rmsnorm(x, w),
    "rmsnorm, hf": lambda x, r, z, w, b: norm_plugin.rmsnorm(x, w, numerics="hf"),
    "gemma_rmsnorm": lambda x, r, z, w, b: norm_plugin.gemma_rmsnorm(x, w),
    "add_rmsnorm": lambda x, r, z, w, b: norm_plugin.add_rmsnorm(x, r, w),
    "add_rmsnorm, vllm_c": lambda x, r, z, w, b: norm_plugin.add_rmsnorm(x, r, w, numerics="vllm_c"),
    "fused_add_rmsnorm": lambda x, r, z, w, b: in_place(norm_plugin.fused_add_rmsnorm, x, r, w),
    "gemma_fused_add_rmsnorm": lambda x, r, z, w, b: in_place(norm_plugin.gemma_fused_add_rmsnorm, x, r, w),
    "layernorm": lambda x, r, z, w, b: norm_plugin.layernorm(x, w, b),
    "layernorm_fn": lambda x, r, z, w, b: norm_plugin.layernorm_fn(x, w, b, z, group_size=50),
    "rmsnorm_fn": lambda x, r, z, w, b: norm_plugin.rmsnorm_fn(x, w, None, z, norm_before_gate=False),
    "l2norm": lambda x, r, z, w, b: norm_plugin.l2norm(x),
}


def in_place(function: Callable[..., None], x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    x, r = x * 1, r * 1
    function(x, r, w)
    return x, r


@pytest.mark.parametrize("name", PUBLIC)
def test_the_forward_has_the_same_bits_in_training_and_in_inference(name: str) -> None:
    """With gradients recorded, without, and without by the shortcut of a second call; the gradients are there."""
    tensors = [TRITON.make("normal", SHAPE, torch.bfloat16, seed).requires_grad_() for seed in (1, 2, 3)]
    tensors += [make(SHAPE[-1], torch.bfloat16).requires_grad_() for make in (TRITON.weights, TRITON.biases)]
    found = []
    for recorded in (True, False, False):
        with torch.set_grad_enabled(recorded):
            out = PUBLIC[name](*tensors)
        found.append(out if isinstance(out, tuple) else (out,))
    assert found[0][0].requires_grad
    assert not found[1][0].requires_grad
    for outs in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(found[0], outs, strict=True))
    sum(out.float().square().sum() for out in found[0]).backward()
    assert tensors[0].grad is not None
    assert any(op.endswith("_backward") for op in ran())


def ran() -> Counter[str]:
    """Op -> calls, all of which were on a kernel."""
    assert {route.backend for route in dispatch.routes()} == {"triton"}
    return Counter({route.op.name: dispatch.calls(route.op.name) for route in dispatch.routes()})


@pytest.mark.parametrize("stable", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_triton_transformers_layernorm(dtype: torch.dtype, stable: bool) -> None:
    """use_triton against PyTorch, which is held against fp64 elsewhere: the same sums in another order, and a rounding
    that may fall on either side."""
    made = []
    for use_triton in (True, False):
        x = TRITON.make("normal", SHAPE, dtype, 1).requires_grad_()
        gamma = TRITON.weights(SHAPE[-1], dtype).requires_grad_()
        y = layernorm(x, gamma, use_triton=use_triton, stable=stable)
        y.backward(TRITON.make("normal", SHAPE, dtype, 2))
        assert ran() == {"layernorm": 1, "layernorm_backward": 1}  # without use_triton nothing is added to it
        made.append([y.detach(), x.grad, gamma.grad])
    for ours, native in zip(*made, strict=True):
        unit = torch.finfo(dtype).eps + SHAPE[-1] * 2.0**-24
        assert (ours - native).abs().max() <= unit * native.abs().max()


def test_layernorm_linear() -> None:
    """The norm is computed again for the gradient of the matrix, by the same kernel, and not kept."""
    x = TRITON.make("normal", SHAPE, torch.bfloat16, 1).requires_grad_()
    weight, bias = (make(SHAPE[-1], torch.bfloat16).requires_grad_() for make in (TRITON.weights, TRITON.biases))
    matrix = TRITON.make("normal", (16, SHAPE[-1]), torch.bfloat16, 3).requires_grad_()
    offset = TRITON.biases(16, torch.bfloat16).requires_grad_()
    norm_plugin.layernorm_linear(x, weight, bias, matrix, offset).float().square().sum().backward()
    assert ran() == {"layernorm_linear": 1, "layernorm": 1, "layernorm_backward": 1}
    assert all(t.grad is not None and t.grad.isfinite().all() for t in (x, weight, bias, matrix, offset))
