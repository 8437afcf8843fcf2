"""The backward ops on their kernels: against autograd through the oracle in fp64, beside plain autograd in fp32.

The grid: every sort of backward (with and without a mean, a gate before or after, groups, the gradient of a sum, Gemma,
l2) x dtypes, then x every sort of launch: one row a program or several, a row in one chunk or many, a last block that
is not full, rows that are read twice in parts of their columns.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import norm_plugin
from norm_plugin import dispatch, settings
from norm_plugin.accuracy import bounds, ulps
from norm_plugin.gradients import BACKWARD_OPS
from norm_plugin.ops import OPS
from tests.kernels import twins
from tests.kernels.backward_calls import (
    KINDS,
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
from tests.spec import judge, samples, test_gradients

DTYPES = [torch.bfloat16, torch.float32, torch.float16]

#: (warps, rows, programs, stages), (): in parts of columns.
ENTRIES = [(1, 1, 1, 1), (4, 1, 3, 2), (1, 2, 2, 1), (2, 8, 1, 3), (4, 16, 2, 1), ()]


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


@every_kind
def test_no_worse_than_autograd_of_the_formula(name: str, variant: samples.Arguments) -> None:
    dtype = DTYPES[KINDS.index((name, variant)) % 3]
    a = TRITON.arguments(OPS[name], (130, 64), dtype, **variant)
    grads = incoming(name, (130, 64), dtype)
    right(name, a, gradients(name, a, *grads), *grads)


@pytest.mark.parametrize("entry", ENTRIES, ids=str)
@few_kinds
def test_right_in_every_configuration(name: str, variant: samples.Arguments, entry: tuple[int, ...]) -> None:
    """37 rows are no multiple of any tile or block."""
    a = TRITON.arguments(OPS[name], (37, 80), torch.bfloat16, **variant)
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
    a = TRITON.arguments(OPS[name], shape, dtype, is_rms_norm=True) if name == "gated_norm" else None
    a = a or TRITON.arguments(OPS[name], shape, dtype)
    grads = incoming(name, shape, dtype)
    with forced(entry):
        ours = gradients(name, a, *grads)
    truth = test_gradients.true_gradients(name, a, *grads)
    for key, found in ours.items():
        limit = 2 * (torch.finfo(dtype).eps + width * bounds.rounding(dtype)) * truth[key].abs().max()
        assert (found.double() - truth[key]).abs().max() <= limit, key


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
    a = TRITON.arguments(OPS[name], (0, 48), torch.bfloat16, **variant)
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
    a = TRITON.arguments(op, (5, 48), torch.bfloat16, **variant)
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
    a = TRITON.arguments(OPS["rmsnorm"], (5, 48), torch.bfloat16, eps=0.0)
    grads = incoming("rmsnorm", (5, 48), torch.bfloat16)
    with forced(entry):
        assert all(g.isfinite().all() for g in gradients("rmsnorm", a, *grads).values())


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
@pytest.mark.parametrize("numerics", ["fp32", "hf"])
def test_a_step_through_the_public_functions(numerics: str) -> None:
    """Everything together under autograd, on kernels in both directions."""
    x, weight = TRITON.make("normal", (64, 1024), torch.bfloat16), TRITON.weights(1024, torch.bfloat16)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    norm_plugin.rmsnorm(x, weight, numerics=numerics).float().square().sum().backward()
    assert dispatch.calls("rmsnorm", "triton") == dispatch.calls("rmsnorm_backward", "triton") == 1
    assert x.grad is not None
    assert weight.grad is not None
