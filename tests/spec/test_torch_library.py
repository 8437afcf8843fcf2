"""The registration of every op: opcheck, one node in a compiled graph, dynamic shapes, and fakes that refuse and answer
as the ops do.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule

import norm_plugin
from norm_plugin.accuracy import inputs
from norm_plugin.gradients import BACKWARD_OPS
from norm_plugin.op import Op
from norm_plugin.ops import OPS
from norm_plugin.ranks.ops import RANK_OPS
from tests.spec import layouts, samples
from tests.spec.test_errors import BAD, good_arguments
from tests.spec.test_gradients import DIFFERENTIABLE

every_case = pytest.mark.parametrize(("op", "variant"), samples.CASES, ids=samples.IDS)


def differentiated(op: Op, a: samples.Arguments) -> samples.Arguments:
    """The call with tensors that require a gradient, where the op has one."""
    if op.name not in DIFFERENTIABLE:
        return a
    return {key: value.requires_grad_() if isinstance(value, Tensor) else value for key, value in a.items()}


def test_every_op_has_samples() -> None:
    """An op without samples fails here. With samples, the tests below check it."""
    assert set(samples.VARIANTS) == set(OPS)
    assert all(samples.VARIANTS.values())
    assert {name for name in dir(torch.ops.norm_plugin) if not name.startswith("_")} >= set(OPS)


def test_all_ops_of_the_library_are_known() -> None:
    """No op is registered outside the tables, where no test would see it."""
    schemas = torch._C._jit_get_all_schemas()
    found = {s.name.removeprefix("norm_plugin::") for s in schemas if s.name.startswith("norm_plugin::")}
    assert found == {*OPS, *BACKWARD_OPS, *RANK_OPS}


def opcheck(op: Op, a: samples.Arguments, *but: str) -> None:
    """torch's opcheck. Its schema check cannot compare fp8 outputs, so these are int8 here."""
    tests = {"test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"} - set(but)
    overload = getattr(torch.ops.norm_plugin, op.name).default
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's, of profiling and of its own deprecated parts
        if "scale" in op.arguments and a["out"].dtype != torch.int8:
            integer = a | {"out": torch.zeros(a["out"].shape, dtype=torch.int8)}
            torch.library.opcheck(overload, tuple(integer.values()), test_utils="test_schema")
            tests -= {"test_schema"}
        torch.library.opcheck(overload, tuple(a.values()), test_utils=sorted(tests))


@every_case
def test_opcheck(op: Op, variant: samples.Arguments) -> None:
    """Checks the schema (what is written, and that no argument is returned), the autograd registration, the fake, and
    all of them through AOTAutograd with dynamic shapes. That is slow, and the same for calls that differ only in a
    number or a name. So it runs for the first variant of an op, and for those that leave out an argument."""
    traced = variant == samples.VARIANTS[op.name][0] or None in variant.values()
    but = () if traced else ("test_aot_dispatch_dynamic",)
    opcheck(op, differentiated(op, samples.arguments(op, (3, 48), torch.bfloat16, **variant)), *but)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("shape", "layout"),
    [((0, 48), "contiguous"), *product([(48,), (2, 3, 48)], layouts.LAYOUTS)],
    ids=lambda value: str(value),
)
@pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())
def test_opcheck_of_other_ranks_and_layouts(op: Op, shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    a = samples.arguments(op, shape, dtype)
    a |= {name: layouts.LAYOUTS[layout](a[name]) for name in samples.alike(op) if a[name] is not None}
    opcheck(op, a, "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("layout", layouts.LAYOUTS.values(), ids=layouts.LAYOUTS.keys())
@every_case
def test_fakes_answer_as_the_ops(op: Op, variant: samples.Arguments, layout: Callable[[Tensor], Tensor]) -> None:
    """Shape, dtype and strides of all outputs."""
    a = samples.arguments(op, (4, 3, 48), torch.bfloat16, **variant)
    a |= {name: layout(a[name]) for name in samples.alike(op) if a[name] is not None}
    real = getattr(torch.ops.norm_plugin, op.name)(*a.values())
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(v) if isinstance(v, Tensor) else v for v in a.values()]
        fake = getattr(torch.ops.norm_plugin, op.name)(*fakes)
    pairs = zip(*((r,) if isinstance(r, Tensor) else r or () for r in (real, fake)), strict=True)
    for one, other in pairs:
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


# --- compiled -----------------------------------------------------------------------------------------------------


class Capture:
    """A backend that counts the nodes of its graphs, and runs them as they are."""

    def __init__(self) -> None:
        self.nodes: Counter[str] = Counter()
        self.graphs = 0

    def __call__(self, graph: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        self.graphs += 1
        for node in graph.graph.nodes:
            if node.op in ("call_function", "call_method"):
                self.nodes[str(node.target)] += 1
        return graph.forward

    def ours(self) -> Counter[str]:
        return Counter({name: n for name, n in self.nodes.items() if name.startswith("norm_plugin.")})


X, W, B = (lambda: inputs.make("normal", (4, 48), torch.bfloat16)), inputs.weights(48), inputs.biases(48)
FP8 = torch.float8_e4m3fn

#: Every public function, called on one x, and the node that it must leave.
PUBLIC: dict[str, tuple[str, Callable[[Tensor], Any]]] = {
    "rmsnorm": ("rmsnorm", lambda x: norm_plugin.rmsnorm(x, W)),
    "rmsnorm into out": ("rmsnorm_out", lambda x: norm_plugin.rmsnorm(x, W, out=torch.empty_like(x))),
    "gemma_rmsnorm": ("rmsnorm", lambda x: norm_plugin.gemma_rmsnorm(x, W)),
    "add_rmsnorm": ("add_rmsnorm", lambda x: norm_plugin.add_rmsnorm(x, x, W)),
    "fused_add_rmsnorm": ("fused_add_rmsnorm", lambda x: norm_plugin.fused_add_rmsnorm(x, x + 1, W)),
    "gemma_fused_add_rmsnorm": ("fused_add_rmsnorm", lambda x: norm_plugin.gemma_fused_add_rmsnorm(x, x + 1, W)),
    "l2norm": ("l2norm", norm_plugin.l2norm),
    "layernorm": ("layernorm", lambda x: norm_plugin.layernorm(x, W, B)),
    "layernorm_linear": ("layernorm_linear", lambda x: norm_plugin.layernorm_linear(x, W, B, torch.ones(5, 48), None)),
    "layernorm_fn": ("gated_norm", lambda x: norm_plugin.layernorm_fn(x, W, B, x)),
    "rmsnorm_fn": ("gated_norm", lambda x: norm_plugin.rmsnorm_fn(x, W, None, x, group_size=16)),
    "rmsnorm_quant": ("rmsnorm_quant", lambda x: norm_plugin.rmsnorm_quant(torch.empty_like(x, dtype=FP8), x, W, 0.5)),
    "fused_add_rmsnorm_quant": (
        "fused_add_rmsnorm_quant",
        lambda x: norm_plugin.fused_add_rmsnorm_quant(torch.empty_like(x, dtype=FP8), x, x + 1, W, 0.5),
    ),
    "rmsnorm_dynamic_quant": ("rmsnorm_dynamic_quant", lambda x: norm_plugin.rmsnorm_dynamic_quant(x, W)),
    "rmsnorm_block_quant": ("rmsnorm_block_quant", lambda x: norm_plugin.rmsnorm_block_quant(x, W, group_size=16)),
    "layernorm_quant": (
        "layernorm_quant",
        lambda x: norm_plugin.layernorm_quant(torch.empty_like(x, dtype=FP8), x, W, B, 0.5),
    ),
}


def test_every_public_function_is_compiled_below() -> None:
    assert {name.removesuffix(" into out") for name in PUBLIC} == set(norm_plugin.__all__)


def tensors_of(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result or ())


@pytest.mark.parametrize("name", PUBLIC)
def test_one_node_a_call_in_one_graph(name: str) -> None:
    node, call = PUBLIC[name]

    def model(x: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = x * 2
        first = tensors_of(call(x))
        return x, first + tensors_of(call(x))

    torch._dynamo.reset()
    capture = Capture()
    compiled = torch.compile(model, fullgraph=True, backend=capture)
    x, outs = compiled(X())
    assert capture.graphs == 1
    assert capture.ours() == {f"norm_plugin.{node}": 2}
    expected_x, expected = model(X())
    assert torch.equal(x, expected_x)
    assert all(torch.equal(one.float(), other.float()) for one, other in zip(outs, expected, strict=True))


@pytest.mark.parametrize("name", ["rmsnorm", "add_rmsnorm", "layernorm", "layernorm_linear", "layernorm_fn", "l2norm"])
def test_gradients_through_a_compiled_graph(name: str) -> None:
    _, call = PUBLIC[name]
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: sum(t.sum() for t in tensors_of(call(x))), fullgraph=True, backend="aot_eager")
    xs = [inputs.make("normal", (4, 48)).requires_grad_() for _ in range(2)]
    compiled(xs[0]).backward()
    sum(t.sum() for t in tensors_of(call(xs[1]))).backward()
    torch.testing.assert_close(xs[0].grad, xs[1].grad)


@pytest.mark.parametrize("name", PUBLIC)
def test_dynamic_rows_and_none_at_all(name: str) -> None:
    """One graph serves any number of rows from two on. torch makes other graphs for 0 and 1, and 0 rows work."""
    _, call = PUBLIC[name]

    def model(x: Tensor) -> list[Tensor]:
        x = x * 1
        return [x, *tensors_of(call(x))]

    torch._dynamo.reset()
    capture = Capture()
    compiled = torch.compile(model, fullgraph=True, backend=capture, dynamic=True)
    for rows in (2, 3, 17, 64):
        x = inputs.make("normal", (rows, 48), torch.bfloat16)
        pairs = zip(compiled(x), model(x), strict=True)
        assert all(torch.equal(one.float(), other.float()) for one, other in pairs)
    assert capture.graphs == 1
    assert [t.shape[0] for t in compiled(torch.empty(0, 48, dtype=torch.bfloat16))] == [0] * len(model(X()))


# --- refusals -----------------------------------------------------------------------------------------------------

#: Without the check that needs real tensors.
ON_ONE_DEVICE = [what for what in BAD if "device" not in what and "one over another" not in what]


@pytest.mark.parametrize("what", ON_ONE_DEVICE)
def test_the_fake_refuses_what_the_op_refuses(what: str) -> None:
    """With the same message. (torch itself refuses a fake tensor of another device, with its own.)"""
    bad = BAD[what]
    mode = FakeTensorMode()
    a = good_arguments(OPS[bad.op]) | bad.wrong
    fakes = [mode.from_tensor(value) if isinstance(value, Tensor) else value for value in a.values()]
    with mode, pytest.raises(bad.error) as raised:
        getattr(torch.ops.norm_plugin, bad.op)(*fakes)
    assert str(raised.value) == bad.message
