"""The shortcut recognises no call in which torch has a part: a mode, a transform, a fake tensor, a compiler. A mode
that only records no gradients is no obstacle.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import norm_plugin
from norm_plugin import dispatch, settings
from norm_plugin.native import rms
from tests.kernels import twins
from tests.kernels.shortcut_calls import needs_guards, weight_of, x_of

pytestmark = needs_guards


class Passing(TorchDispatchMode):
    """A mode that looks at every op, and changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_a_mode_sees_the_op(recognised: list[bool]) -> None:
    x, weight = x_of(), weight_of()
    for mode in (nullcontext(), nullcontext(), Passing()):
        with mode:
            norm_plugin.rmsnorm(x, weight)
    assert recognised == [False, True, False]
    assert "rmsnorm" in mode.seen


def test_fake_tensors_are_not_recognised(recognised: list[bool]) -> None:
    x, weight = x_of(), weight_of()
    for _ in range(2):
        norm_plugin.rmsnorm(x, weight)
    before = dispatch.calls("rmsnorm")
    with FakeTensorMode() as mode:
        fake = norm_plugin.rmsnorm(mode.from_tensor(x), mode.from_tensor(weight))
    outside = norm_plugin.rmsnorm(mode.from_tensor(x), mode.from_tensor(weight))
    assert type(fake) is type(outside) is type(mode.from_tensor(x))
    assert recognised == [False, True, False, False]
    assert dispatch.calls("rmsnorm") == before


def test_transforms_are_not_recognised(recognised: list[bool]) -> None:
    """vmap over x, with a weight that is no part of it."""
    x, weight = x_of().float(), weight_of().float()
    for _ in range(2):
        norm_plugin.rmsnorm(x, weight)
    batched = torch.func.vmap(lambda row: norm_plugin.rmsnorm(row[None], weight)[0])(x)
    torch.testing.assert_close(batched, rms.rmsnorm(x, weight))
    assert recognised[:2] == [False, True]
    assert not any(recognised[2:])


def test_a_transform_around_plain_tensors_is_not_recognised(recognised: list[bool]) -> None:
    """The tensors are the ones that are known; what goes on around them is not."""
    x, weight = x_of(), weight_of()
    for _ in range(2):
        norm_plugin.rmsnorm(x, weight)

    def inside(t: Tensor) -> Tensor:
        return norm_plugin.rmsnorm(x, weight).sum() + t

    torch.func.vmap(inside)(torch.zeros(2, device=x.device))
    with settings.override(strict=False):  # the native op is differentiated
        torch.func.grad(inside)(torch.zeros((), device=x.device))
    assert recognised == [False, True, False, False]


def test_forward_mode_gradients_are_not_recognised(recognised: list[bool]) -> None:
    x, weight = x_of(), weight_of()
    for _ in range(2):
        norm_plugin.rmsnorm(x, weight)
    with forward_ad.dual_level(), settings.override(strict=False):  # the native op is differentiated
        norm_plugin.rmsnorm(x, weight)
    assert recognised == [False, True]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_without_gradients_are_recognised_in_themselves(
    mode: Callable[[], AbstractContextManager[None]], recognised: list[bool]
) -> None:
    """And what was learnt in one of them is not taken outside for a tensor that wants a gradient."""
    x, weight = x_of(), weight_of().requires_grad_()
    with mode():
        for _ in range(3):
            norm_plugin.rmsnorm(x, weight)
    assert recognised == [False, True, True]
    assert norm_plugin.rmsnorm(x, weight).requires_grad
    assert recognised[-1] is False


def test_compiled_code_calls_the_op() -> None:
    """Dynamo traces the function without looking into the shortcut: one graph, with the op in it."""
    x, weight = x_of(), weight_of()
    for _ in range(2):
        norm_plugin.rmsnorm(x, weight)
    graphs = []

    def backend(graph: Any, examples: Any) -> Any:
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    compiled = torch.compile(lambda t: norm_plugin.rmsnorm(t, weight), backend=backend, fullgraph=True)
    assert twins.same_bits(compiled(x), norm_plugin.rmsnorm(x, weight))
    (graph,) = graphs
    assert any("norm_plugin.rmsnorm" in target for target in graph)
