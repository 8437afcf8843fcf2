"""The backward ops: their registration, what they return, what autograd keeps for them, and second derivatives.

test_gradients shows through autograd that their values are right in every variant.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradgradcheck
from torch.autograd.graph import saved_tensors_hooks

import norm_plugin
from norm_plugin import dispatch
from norm_plugin.accuracy import inputs
from norm_plugin.gradients import BACKWARD_OPS
from norm_plugin.native import backward
from norm_plugin.op import Op
from norm_plugin.ops import OPS
from tests.spec import samples
from tests.spec.test_gradients import EPS, ROWS, WIDTH, function_of, leaves
from tests.spec.test_torch_library import Capture, opcheck

VARIANTS: dict[str, list[samples.Arguments]] = {
    "rmsnorm_backward": [{}, {"residual_grad": None}, {"weight": None, "weight_grad": False}, {"gemma": True},
                         {"weight_grad": False}],
    "l2norm_backward": [{}],
    "layernorm_backward": [{}, {"weight": None}, {"bias": None}, {"weight_grad": False}, {"bias_grad": False}],
    "gated_norm_backward": [{}, {"z": None}, {"norm_before_gate": False, "group_size": 16}, {"weight": None},
                            {"weight_grad": False, "bias_grad": False}],
}  # fmt: skip
CASES = [(BACKWARD_OPS[name], variant) for name, variants in VARIANTS.items() for variant in variants]
every_case = pytest.mark.parametrize(
    ("op", "variant"), CASES, ids=[samples.label(op.name, variant) for op, variant in CASES]
)


def arguments(op: Op, shape: tuple[int, ...], dtype: torch.dtype, **variant: Any) -> samples.Arguments:
    """A call of a backward op."""
    given = {name: inputs.make("normal", shape, dtype, seed) for seed, name in enumerate(("grad", "residual_grad"), 7)}
    return samples.arguments(op, shape, dtype, **({k: v for k, v in given.items() if k in op.arguments} | variant))


def listed(found: Any) -> list[Tensor]:
    return list(found) if isinstance(found, (list, tuple)) else [found]


def test_every_backward_op_is_checked_here() -> None:
    assert set(VARIANTS) == set(BACKWARD_OPS)
    assert not set(BACKWARD_OPS) & set(OPS)


@pytest.mark.parametrize("op", BACKWARD_OPS.values(), ids=BACKWARD_OPS.keys())
def test_the_native_twin_has_the_ops_arguments(op: Op) -> None:
    assert tuple(inspect.signature(getattr(backward, op.name)).parameters) == op.arguments


@pytest.mark.parametrize("shape", [(3, 48), (0, 48), (2, 3, 48)], ids=str)
@every_case
def test_opcheck(op: Op, variant: samples.Arguments, shape: tuple[int, ...]) -> None:
    but = () if shape == (3, 48) else ("test_aot_dispatch_dynamic",)
    opcheck(op, arguments(op, shape, torch.bfloat16, **variant), *but)


@every_case
def test_only_what_is_asked_for_is_returned(op: Op, variant: samples.Arguments) -> None:
    """In the order of the arguments, each in the dtype of its argument."""
    a = arguments(op, (3, 48), torch.bfloat16, weight_dtype=torch.float32, **variant)
    asked = [op.arguments[op.x], *(name for name in ("z", "weight", "bias") if a.get(name) is not None)]
    asked = [name for name in asked if a.get(f"{name}_grad", True)]
    if op.name == "l2norm_backward":
        asked = asked[:1]
    found = listed(dispatch.call(op, *a.values()))
    assert [(t.shape, t.dtype) for t in found] == [(a[name].shape, a[name].dtype) for name in asked]


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("rmsnorm_backward", {"grad": torch.ones(4, 48)},
         "grad has shape [4, 48]; it must have the shape of input, [3, 48]."),
        ("rmsnorm_backward", {"residual_grad": torch.ones(3, 47)},
         "residual_grad has shape [3, 47]; it must have the shape of input, [3, 48]."),
        ("layernorm_backward", {"weight": torch.ones(47)},
         "weight has shape [47]; it must be [48], the last dimension of input."),
        ("gated_norm_backward", {"activation": "gelu"},
         "activation is 'gelu'; it must be one of silu, swish, sigmoid."),
    ],
)  # fmt: skip
def test_bad_input(name: str, wrong: samples.Arguments, message: str) -> None:
    a = arguments(BACKWARD_OPS[name], (3, 48), torch.float32) | wrong
    with pytest.raises(ValueError, match=re.escape(message)):
        dispatch.call(BACKWARD_OPS[name], *a.values())


DIFFERENTIABLE: dict[str, samples.Arguments] = {
    "rmsnorm": {}, "add_rmsnorm": {}, "l2norm": {}, "layernorm": {}, "layernorm_linear": {},
    "gated_norm": {"group_size": 4},
}  # fmt: skip


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_second_derivatives(name: str) -> None:
    """PyTorch computes them, they are right, and a log line says so."""
    a = samples.arguments(OPS[name], (ROWS, WIDTH), torch.float64, eps=EPS, **DIFFERENTIABLE[name])
    assert gradgradcheck(function_of(name, a), tuple(leaves(a).values()))


def test_a_second_derivative_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    dispatch.log_once.cache_clear()
    for _ in range(2):
        x = inputs.make("normal", (3, 48)).requires_grad_()
        (dx,) = torch.autograd.grad(norm_plugin.rmsnorm(x, None).square().sum(), x, create_graph=True)
        dx.square().sum().backward()
    said = [record.getMessage() for record in caplog.records]
    assert said == ["the gradient of rmsnorm_backward (a second derivative) is computed by PyTorch"]


# --- what is kept -------------------------------------------------------------------------------------------------

M, N = 32, 96
KEPT: dict[str, tuple[Callable[..., Any], tuple[str, ...], int]] = {
    # (the call on x, r, z, w, b; what autograd may keep; the number of x-sized tensors)
    "rmsnorm": (lambda x, r, z, w, b: norm_plugin.rmsnorm(x, w), ("x", "w"), 1),
    "gemma_rmsnorm": (lambda x, r, z, w, b: norm_plugin.gemma_rmsnorm(x, w), ("x", "w"), 1),
    "add_rmsnorm": (lambda x, r, z, w, b: norm_plugin.add_rmsnorm(x, r, w), ("w",), 1),
    "l2norm": (lambda x, r, z, w, b: norm_plugin.l2norm(x), ("x",), 1),
    "layernorm": (lambda x, r, z, w, b: norm_plugin.layernorm(x, w, b), ("x", "w", "b"), 1),
    "rmsnorm_fn": (lambda x, r, z, w, b: norm_plugin.rmsnorm_fn(x, w, None, z), ("x", "z", "w"), 2),
    "layernorm_fn": (lambda x, r, z, w, b: norm_plugin.layernorm_fn(x, w, b, z), ("x", "z", "w", "b"), 2),
}


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_what_is_kept_for_the_backward(name: str, dtype: torch.dtype) -> None:
    """x and z without copies, for a fused add the sum that it returns anyway, and no statistics."""
    call, allowed, big = KEPT[name]
    given = {key: inputs.make("normal", (M, N), dtype, seed).requires_grad_() for seed, key in enumerate("xrz")}
    given |= {key: inputs.weights(N, dtype).requires_grad_() for key in "wb"}
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        out = call(*given.values())
    memory = {given[key].data_ptr() for key in allowed}
    if name == "add_rmsnorm":
        memory.add(out[1].data_ptr())
    assert {t.data_ptr() for t in kept} == memory
    assert sum(t.numel() for t in kept if t.numel() == M * N) == big * M * N


def test_the_fused_add_in_place_keeps_its_sum_alone() -> None:
    x, r = (inputs.make("normal", (M, N), seed=seed).requires_grad_() for seed in (1, 2))
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        input, residual = x * 1, r * 1
        kept.clear()
        norm_plugin.fused_add_rmsnorm(input, residual, None)
    assert [t.numel() for t in kept] == [M * N]


# --- compiled -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rmsnorm", "add_rmsnorm", "l2norm", "layernorm", "gated_norm"])
def test_one_node_in_the_compiled_backward(name: str) -> None:
    """AOTAutograd traces forward and backward. Each is one op of ours, not its formula."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    torch._dynamo.reset()
    graphs = {"forward": Capture(), "backward": Capture()}
    boxed = {
        which: (lambda *given, capture=capture: make_boxed_func(capture(*given))) for which, capture in graphs.items()
    }
    backend = aot_autograd(fw_compiler=boxed["forward"], bw_compiler=boxed["backward"])
    a = samples.arguments(OPS[name], (4, 48), torch.bfloat16)
    compiled = torch.compile(function_of(name, a), fullgraph=True, backend=backend)
    found = []
    for f in (compiled, function_of(name, a)):
        tensors = leaves(a)
        outs = f(*tensors.values())
        outs = outs if isinstance(outs, tuple) else (outs,)
        grads = [inputs.make("normal", out.shape, out.dtype, 7) for out in outs]
        found.append(torch.autograd.grad(outs, list(tensors.values()), grads))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    ours = {which: dict(graph.ours()) for which, graph in graphs.items()}
    of_add = "rmsnorm_backward" if name == "add_rmsnorm" else f"{name}_backward"
    assert ours == {
        "forward": {f"norm_plugin.{name}.default": 1},
        "backward": {f"norm_plugin.{of_add}.default": 1},
    }
