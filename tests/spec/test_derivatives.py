"""torch.func and forward mode differentiate the functions through their native ops; compared with differences in fp64.

The ops have no formula for either. torch.ops.norm_plugin.* says so, because torch would take the derivative for zero.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import norm_plugin
from norm_plugin import dispatch, settings
from norm_plugin.accuracy import inputs
from tests.spec.refused import FORMULA

F64 = torch.float64


def x_of(seed: int = 1) -> Tensor:
    return inputs.make("normal", (3, 8), torch.float32, seed).to(F64)


#: Parameters and the like, which no transform replaces.
W, B, R, L = x_of(3)[0], x_of(4)[0], x_of(4), x_of(5)

CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "rmsnorm": lambda x: norm_plugin.rmsnorm(x, W),
    "gemma_rmsnorm": lambda x: norm_plugin.gemma_rmsnorm(x, W),
    "add_rmsnorm": lambda x: norm_plugin.add_rmsnorm(x, R, None)[0],
    "l2norm": norm_plugin.l2norm,
    "layernorm": lambda x: norm_plugin.layernorm(x, W, B),
    "layernorm_linear": lambda x: norm_plugin.layernorm_linear(x, None, None, L, None),
    "layernorm_fn": lambda x: norm_plugin.layernorm_fn(x, W, None, R),
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())


def slope(call: Callable[[Tensor], Tensor], x: Tensor, direction: Tensor) -> Tensor:
    """The derivative along a direction, by differences in fp64."""
    step = 1e-5
    return (call(x + step * direction) - call(x - step * direction)) / (2 * step)


@every_call
def test_jvp(call: Callable[[Tensor], Tensor]) -> None:
    x, direction = x_of(), x_of(2)
    value, tangent = torch.func.jvp(call, (x,), (direction,))
    torch.testing.assert_close(value, call(x))
    torch.testing.assert_close(tangent, slope(call, x, direction), rtol=1e-6, atol=1e-8)


@every_call
def test_dual_numbers(call: Callable[[Tensor], Tensor]) -> None:
    x, direction = x_of(), x_of(2)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(call(forward_ad.make_dual(x, direction)))
        assert found.tangent is not None
        torch.testing.assert_close(found.tangent, slope(call, x, direction), rtol=1e-6, atol=1e-8)


@every_call
def test_jacobians_in_both_modes(call: Callable[[Tensor], Tensor]) -> None:
    torch.testing.assert_close(torch.func.jacfwd(call)(x_of()), torch.func.jacrev(call)(x_of()))


@every_call
def test_grad_and_grad_of_rows(call: Callable[[Tensor], Tensor]) -> None:
    """grad of one input, and under vmap of several inputs at once."""

    def loss(x: Tensor) -> Tensor:
        return call(x).sin().sum()

    x = x_of().requires_grad_()
    loss(x).backward()
    assert x.grad is not None
    torch.testing.assert_close(torch.func.grad(loss)(x_of()), x.grad)
    batched = torch.func.vmap(torch.func.grad(loss))(torch.stack([x_of(), x_of(2)]))
    torch.testing.assert_close(batched[0], x.grad)


def test_in_place_under_grad() -> None:
    def loss(x: Tensor) -> Tensor:
        h, residual = x * 1, R.clone()
        norm_plugin.fused_add_rmsnorm(h, residual, None)
        return (h + residual).sin().sum()

    x = x_of().requires_grad_()
    loss(x).backward()
    assert x.grad is not None
    torch.testing.assert_close(torch.func.grad(loss)(x_of()), x.grad)


def test_an_op_says_that_it_has_no_formula_for_dual_numbers() -> None:
    """(refused.py has torch.func.jvp of an op.)"""
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=re.escape(FORMULA)):
        torch.ops.norm_plugin.rmsnorm(forward_ad.make_dual(x_of(), x_of(2)), None)


def test_it_is_counted_with_its_reason() -> None:
    dispatch.reset()
    torch.func.grad(lambda x: norm_plugin.rmsnorm(x, None).sum())(x_of())
    (route,) = dispatch.routes()
    assert (route.backend, route.reason) == ("native", "torch.func or forward-mode differentiation")
    assert dispatch.calls("rmsnorm", "native") == 1


def test_strict_forbids_it_where_a_kernel_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with settings.override(backend="triton", strict=True), pytest.raises(dispatch.BackendError, match=r"torch\.func"):
        torch.func.grad(lambda x: norm_plugin.rmsnorm(x, None).sum())(x_of().float())
