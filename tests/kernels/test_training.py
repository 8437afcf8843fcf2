"""Functions whose gradient is made of several ops, on the kernels: all of them run there, in both directions."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

import norm_plugin
from norm_plugin import dispatch
from norm_plugin.compat.triton_transformer import layernorm
from norm_plugin.verify import inputs

SHAPE = (4, 200)


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
        x = inputs.make("normal", SHAPE, dtype, 1).requires_grad_()
        gamma = inputs.weights(SHAPE[-1], dtype).requires_grad_()
        y = layernorm(x, gamma, use_triton=use_triton, stable=stable)
        y.backward(inputs.make("normal", SHAPE, dtype, 2))
        assert ran() == {"layernorm": 1, "layernorm_backward": 1}  # without use_triton nothing is added to it
        made.append([y.detach(), x.grad, gamma.grad])
    for ours, native in zip(*made, strict=True):
        unit = torch.finfo(dtype).eps + SHAPE[-1] * 2.0**-24
        assert (ours - native).abs().max() <= unit * native.abs().max()


def test_layernorm_linear() -> None:
    """The norm is computed again for the gradient of the matrix, by the same kernel, and not kept."""
    x = inputs.make("normal", SHAPE, torch.bfloat16, 1).requires_grad_()
    weight, bias = (make(SHAPE[-1], torch.bfloat16).requires_grad_() for make in (inputs.weights, inputs.biases))
    matrix = inputs.make("normal", (16, SHAPE[-1]), torch.bfloat16, 3).requires_grad_()
    offset = inputs.biases(16, torch.bfloat16).requires_grad_()
    norm_plugin.layernorm_linear(x, weight, bias, matrix, offset).float().square().sum().backward()
    assert ran() == {"layernorm_linear": 1, "layernorm": 1, "layernorm_backward": 1}
    assert all(t.grad is not None and t.grad.isfinite().all() for t in (x, weight, bias, matrix, offset))
