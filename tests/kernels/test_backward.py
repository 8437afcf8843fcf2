"""The backward ops on their kernels, against autograd through the oracle in fp64, beside plain autograd in fp32. Their
bits depend only on their inputs.

The grid: every sort of backward (with and without a mean, a gate before or after, groups, the gradient of a sum, Gemma,
l2) x dtypes, then x every sort of launch: one row a program or several, a row in one chunk or many, a last block that
is not full, rows that are read twice in parts of their columns.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor

import norm_plugin
from norm_plugin import dispatch, settings
from norm_plugin.accuracy import bounds, inputs, ulps
from norm_plugin.gradients import BACKWARD_OPS
from norm_plugin.kernels import backward_configs as configs
from norm_plugin.op import Op
from norm_plugin.ops import OPS
from tests.kernels import twins
from tests.kernels.device import COMPILED, on_a_gpu
from tests.spec import judge, samples, test_gradients
from tests.spec.test_layouts import READ

DTYPES = [torch.bfloat16, torch.float32, torch.float16]
GATED = [
    {"norm_before_gate": before, "is_rms_norm": rms, "group_size": group, "activation": activation}
    for before, rms, group, activation in [
        (True, True, None, "silu"),
        (True, False, 16, "sigmoid"),
        (False, True, 16, "silu"),
        (False, False, None, "sigmoid"),
        (False, False, 16, "silu"),
        (True, True, 16, "silu"),
    ]
]
KINDS: list[tuple[str, samples.Arguments]] = [
    ("rmsnorm", {}),
    ("rmsnorm", {"gemma": True}),
    ("rmsnorm", {"weight": None}),
    ("add_rmsnorm", {}),
    ("add_rmsnorm", {"gemma": True}),
    ("l2norm", {}),
    ("layernorm", {}),
    ("layernorm", {"bias": None}),
    ("layernorm", {"weight": None}),
    *(("gated_norm", how) for how in GATED),
    ("gated_norm", {"z": None, "is_rms_norm": True}),
    ("gated_norm", {"bias": None, "is_rms_norm": True}),
]
LABELS = [samples.label(*kind) for kind in KINDS]
every_kind = pytest.mark.parametrize(("name", "variant"), KINDS, ids=LABELS)

#: (warps, rows, programs, stages), (): in parts of columns.
ENTRIES = [(1, 1, 1, 1), (4, 1, 3, 2), (1, 2, 2, 1), (2, 8, 1, 3), (4, 16, 2, 1), ()]


def backward_calls(name: str) -> int:
    return dispatch.calls("rmsnorm_backward" if name == "add_rmsnorm" else f"{name}_backward", "triton")


def incoming(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    return [inputs.make("normal", shape, dtype, seed) for seed in (7, 8)][: 2 if name == "add_rmsnorm" else 1]


def gradients(name: str, a: samples.Arguments, *grads: Tensor) -> dict[str, Tensor]:
    """Through autograd, on the kernels."""
    before = backward_calls(name)
    found = test_gradients.gradients(name, a, *grads)
    assert backward_calls(name) == before + 1
    return found


def right(name: str, a: samples.Arguments, ours: dict[str, Tensor], *grads: Tensor) -> None:
    """Asserts that gradients of rows are no further from fp64 than plain autograd in fp32, row by row, and that those
    of weights and biases are within the bound of a sum over rows, a share of the magnitudes of its terms."""
    op, rows = OPS[name], grads[0].numel() // grads[0].shape[-1]
    truth, plain = (of(name, a, *grads) for of in (test_gradients.true_gradients, test_gradients.fp32_gradients))
    one_a_row = a | {key: a[key].expand(grads[0].shape) for key in ("weight", "bias") if a.get(key) is not None}
    terms = test_gradients.true_gradients(name, one_a_row, *grads)
    for key, found in ours.items():
        assert found.dtype == a[key].dtype
        if key in samples.alike(op):
            judge.no_worse(found, plain[key], truth[key])
        else:
            dtype = a[op.arguments[op.x]].dtype
            magnitudes = sum(terms[k].abs().flatten(0, -2).sum(0) for k in ("weight", "bias") if k in terms)
            bound = (rows + bounds.ROUNDINGS) * bounds.rounding(dtype) * magnitudes
            assert ulps.excess(found, bound, truth[key]) == 0, key


def forced(entry: tuple[int, ...] | None) -> AbstractContextManager[None]:
    return nullcontext() if entry is None else configs.forced(*entry)


#: One of each: a mean or none, a gate before or after or none, groups or none, a sum's gradient.
FEW = [KINDS[LABELS.index(label)] for label in LABELS if label in ("rmsnorm", "add_rmsnorm-gemma=True", "layernorm")]
FEW += [("gated_norm", GATED[1]), ("gated_norm", GATED[2])]
few_kinds = pytest.mark.parametrize(("name", "variant"), FEW, ids=[samples.label(*kind) for kind in FEW])


@every_kind
def test_no_worse_than_autograd_of_the_formula(name: str, variant: samples.Arguments) -> None:
    dtype = DTYPES[KINDS.index((name, variant)) % 3]
    a = samples.arguments(OPS[name], (130, 64), dtype, **variant)
    grads = incoming(name, (130, 64), dtype)
    right(name, a, gradients(name, a, *grads), *grads)


@pytest.mark.parametrize("entry", ENTRIES, ids=str)
@few_kinds
def test_right_in_every_configuration(name: str, variant: samples.Arguments, entry: tuple[int, ...]) -> None:
    """37 rows are no multiple of any tile or block."""
    a = samples.arguments(OPS[name], (37, 80), torch.bfloat16, **variant)
    grads = incoming(name, (37, 80), torch.bfloat16)
    with forced(entry):
        right(name, a, gradients(name, a, *grads), *grads)


SMALL = [1, 3, 111, 1000, 2880, 5127]
WIDTHS = [*SMALL, 1024, 4096, 7168, 8192, 12288, 16384, 18432, 32768, 65536] if COMPILED else SMALL


@pytest.mark.parametrize(
    ("entry", "width"), [*((None, width) for width in WIDTHS), *(((), width) for width in WIDTHS[2::3])], ids=str
)
@pytest.mark.parametrize("name", ["rmsnorm", "add_rmsnorm", "layernorm", "gated_norm"])
def test_every_width(name: str, entry: tuple[int, ...] | None, width: int) -> None:
    dtype = DTYPES[WIDTHS.index(width) % 3]
    shape = (9, width)
    a = samples.arguments(OPS[name], shape, dtype, is_rms_norm=True) if name == "gated_norm" else None
    a = a or samples.arguments(OPS[name], shape, dtype)
    grads = incoming(name, shape, dtype)
    with forced(entry):
        ours = gradients(name, a, *grads)
    truth = test_gradients.true_gradients(name, a, *grads)
    for key, found in ours.items():
        limit = 2 * (torch.finfo(dtype).eps + width * bounds.rounding(dtype)) * truth[key].abs().max()
        assert (found.double() - truth[key]).abs().max() <= limit, key


@pytest.mark.parametrize("layout", READ.values(), ids=READ.keys())
@pytest.mark.parametrize("name", ["add_rmsnorm", "layernorm", "gated_norm"])
def test_incoming_gradients_in_every_layout(name: str, layout: Callable[[Tensor], Tensor]) -> None:
    """Whatever autograd sends, the kernel runs and gives the bits of a contiguous gradient."""
    shape = (2, 3, 5, 48)
    a = samples.arguments(OPS[name], shape, torch.bfloat16)
    grads = [layout(g) for g in incoming(name, shape, torch.bfloat16)]
    ours, plain = gradients(name, a, *grads), gradients(name, a, *(g.contiguous() for g in grads))
    assert all(twins.same_bits(ours[key], plain[key]) for key in ours)


@pytest.mark.parametrize("layout", inputs.LAYOUTS.values(), ids=inputs.LAYOUTS.keys())
@pytest.mark.parametrize("name", ["rmsnorm", "layernorm", "gated_norm"])
def test_rows_in_every_layout(name: str, layout: Callable[[Tensor], Tensor]) -> None:
    """The q of a fused qkv is differentiated where it lies."""
    op = BACKWARD_OPS[f"{name}_backward"]
    dense = arguments(op, (4, 3, 48))
    laid = dense | {key: layout(dense[key]) for key in ("input", "x", "z", "grad") if dense.get(key) is not None}
    for one, other in zip(listed(op, laid), listed(op, dense), strict=True):
        assert twins.same_bits(one, other)


def arguments(op: Op, shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> samples.Arguments:
    """A call of a backward op itself, all gradients asked for."""
    a = samples.arguments(op, shape, dtype)
    return a | {"grad": inputs.make("normal", shape, dtype, 7)}


def listed(op: Op, a: samples.Arguments) -> list[Tensor]:
    found = dispatch.call(op, *a.values())
    return found if isinstance(found, list) else [found]


@few_kinds
@pytest.mark.parametrize("entry", [(1, 1, 1, 1), (1, 4, 1, 1), ()], ids=str)
def test_a_row_does_not_depend_on_its_batch(name: str, variant: samples.Arguments, entry: tuple[int, ...]) -> None:
    """The gradients of rows. (That of a weight is a sum over the rows.)"""
    op, many = OPS[name], 37 if COMPILED else 7
    a = samples.arguments(op, (many, 80), torch.bfloat16, **variant)
    grads = incoming(name, (many, 80), torch.bfloat16)
    with forced(entry):
        whole = gradients(name, a, *grads)
        for rows in (slice(0, 1), slice(many - 1, many), slice(0, 5)):
            part = {key: a[key][rows] for key in samples.alike(op) if a[key] is not None}
            found = gradients(name, a | part, *(g[rows] for g in grads))
            assert all(twins.same_bits(found[key], whole[key][rows]) for key in part if key in found)


@few_kinds
def test_the_same_bits_again(name: str, variant: samples.Arguments) -> None:
    a = samples.arguments(OPS[name], (513 if COMPILED else 17, 80), torch.bfloat16, **variant)
    grads = incoming(name, (513 if COMPILED else 17, 80), torch.bfloat16)
    first = gradients(name, a, *grads)
    for _ in range(20 if COMPILED else 2):
        again = gradients(name, a, *grads)
        assert all(twins.same_bits(again[key], first[key]) for key in first)


@pytest.mark.parametrize("name", ["rmsnorm", "layernorm", "gated_norm"])
def test_partial_sums_are_bounded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """There are never more than the table's programs per multiprocessor, whatever the number of rows. Parameters that
    are not asked for cost nothing."""
    from norm_plugin.kernels.backward import Backward
    from norm_plugin.kernels.launch import processors

    made: list[Backward] = []
    original = Backward.__init__
    monkeypatch.setattr(Backward, "__init__", lambda self, *a, **k: (made.append(self), original(self, *a, **k))[1])
    op = BACKWARD_OPS[f"{name}_backward"]
    a = arguments(op, (5, 4096))
    listed(op, a)
    listed(op, a | {key: False for key in a if key.endswith("_grad") and isinstance(a[key], bool)})
    asked, not_asked = made
    most = processors(a["grad"].device) * asked.config.programs
    for m in (1, most - 1, most, most + 1, 3 * most + 1, 10**6):
        assert 1 <= asked.blocks(m) <= most
        per = -(-m // asked.blocks(m))
        assert (asked.blocks(m) - 1) * per < m <= asked.blocks(m) * per  # no block without rows
        assert not_asked.blocks(m) == m


@every_kind
def test_no_rows(name: str, variant: samples.Arguments) -> None:
    a = samples.arguments(OPS[name], (0, 48), torch.bfloat16, **variant)
    found = gradients(name, a, *incoming(name, (0, 48), torch.bfloat16))
    for key, grad in found.items():
        assert grad.shape == a[key].shape
        assert not grad.any()


@pytest.mark.parametrize(
    ("entry", "value"), [((1, 1, 1, 1), torch.inf), ((1, 4, 1, 1), torch.nan), ((), torch.inf)], ids=str
)
@few_kinds
def test_a_row_that_is_not_finite_spoils_no_other(
    name: str, variant: samples.Arguments, entry: tuple[int, ...], value: float
) -> None:
    op = OPS[name]
    a = samples.arguments(op, (5, 48), torch.bfloat16, **variant)
    grads = incoming(name, (5, 48), torch.bfloat16)
    spoiled = a[op.arguments[op.x]].clone()
    spoiled[2, 24] = value
    others = torch.arange(5) != 2
    with forced(entry):
        sound, found = (gradients(name, b, *grads) for b in (a, a | {op.arguments[op.x]: spoiled}))
    for key in samples.alike(op):
        if key in found:
            assert twins.same_bits(found[key][others], sound[key][others])


@pytest.mark.parametrize("entry", [(1, 4, 1, 1), (1, 1, 1, 1), ()], ids=str)
def test_rows_of_zeros_without_eps_leave_the_sums_of_others_alone(entry: tuple[int, ...]) -> None:
    """A tile that is not full has missing rows, of zeros. Without eps their scale is inf."""
    a = samples.arguments(OPS["rmsnorm"], (5, 48), torch.bfloat16, eps=0.0)
    grads = incoming("rmsnorm", (5, 48), torch.bfloat16)
    with forced(entry):
        assert all(g.isfinite().all() for g in gradients("rmsnorm", a, *grads).values())


@every_kind
def test_training_changes_no_bit_of_the_forward(name: str, variant: samples.Arguments) -> None:
    """One kernel, whether gradients are recorded or not."""
    a = samples.arguments(OPS[name], (9, 1000), torch.bfloat16, **variant)
    recorded = test_gradients.function_of(name, a)(*test_gradients.leaves(a).values())
    with torch.no_grad():
        plain = test_gradients.function_of(name, a)(*(t.detach() for t in test_gradients.leaves(a).values()))
    pairs = zip(*((t,) if isinstance(t, Tensor) else t for t in (recorded, plain)), strict=True)
    assert all(twins.same_bits(one.detach(), other) for one, other in pairs)
    assert dispatch.calls(name, "triton") == 2


REFUSED: dict[str, tuple[str, Callable[[samples.Arguments], samples.Arguments]]] = {
    "a part of the columns": ("the variance is of the first 24 columns only", lambda a: a | {"variance_size": 24}),
    "fp64": ("the kernels compute in fp32", lambda a: a | {"input": a["input"].double()}),
    "input of stride 2": ("the last stride is 2", lambda a: a | {"input": torch.stack([a["input"]] * 2, -1)[..., 0]}),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused_is_native_and_counted(what: str) -> None:
    op = BACKWARD_OPS["rmsnorm_backward"]
    reason, change = REFUSED[what]
    a = change(arguments(op, (4, 48)))
    with settings.override(strict=False):
        found = listed(op, a)
        (route,) = dispatch.routes()
        assert route.reason.startswith(reason)
        assert (route.backend, route.fallback, dispatch.calls(op.name, "native")) == ("native", True, 1)
        dispatch.reset()
    expected = op.native(*a.values())
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    with pytest.raises(dispatch.BackendError, match=reason):
        listed(op, a)


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


@on_a_gpu
@pytest.mark.parametrize("numerics", ["fp32", "hf"])
def test_a_step_through_the_public_functions(numerics: str) -> None:
    """Everything together under autograd, on kernels in both directions."""
    x, weight = inputs.make("normal", (64, 1024), torch.bfloat16), inputs.weights(1024, torch.bfloat16)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    norm_plugin.rmsnorm(x, weight, numerics=numerics).float().square().sum().backward()
    assert dispatch.calls("rmsnorm", "triton") == dispatch.calls("rmsnorm_backward", "triton") == 1
    assert x.grad is not None
    assert weight.grad is not None
