"""The shortcut of eager calls recognises the signatures that it knows, and declines any other call.

A call that it declines takes the ordinary road, which all other tests show to be right.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import norm_plugin
from norm_plugin import dispatch, ops, settings, shortcut
from tests.kernels import twins
from tests.kernels.device import DEVICE
from tests.kernels.shortcut_calls import WIDTH, needs_guards, weight_of, x_of
from tests.spec import layouts

pytestmark = needs_guards


def test_the_second_call_is_recognised_and_counted(recognised: list[bool]) -> None:
    weight = weight_of()
    for rows in (4, 4, 1, 257, 0):
        x = x_of(rows)
        assert twins.same_bits(norm_plugin.rmsnorm(x, weight), torch.ops.norm_plugin.rmsnorm(x, weight))
    assert recognised == [False, True, True, True, True]
    assert dispatch.calls("rmsnorm", "triton") == 10


CALLS: dict[str, Callable[[int], Any]] = {
    "rmsnorm": lambda n: norm_plugin.rmsnorm(x_of(n), weight_of()),
    "rmsnorm_out": lambda n: norm_plugin.rmsnorm(x_of(n), weight_of(), out=x_of(n, seed=2)),
    "gemma_rmsnorm": lambda n: norm_plugin.gemma_rmsnorm(x_of(n), weight_of()),
    "add_rmsnorm": lambda n: norm_plugin.add_rmsnorm(x_of(n), x_of(n, seed=2), weight_of()),
    "fused_add_rmsnorm": lambda n: norm_plugin.fused_add_rmsnorm(x_of(n), x_of(n, seed=2), weight_of()),
    "l2norm": lambda n: norm_plugin.l2norm(x_of(n)),
    "layernorm": lambda n: norm_plugin.layernorm(x_of(n), weight_of(), None),
    "layernorm_linear": lambda n: norm_plugin.layernorm_linear(x_of(n), None, weight_of(), x_of(5), None),
    "layernorm_fn": lambda n: norm_plugin.layernorm_fn(x_of(n), weight_of(), None, x_of(n, seed=2)),
    "rmsnorm_fn": lambda n: norm_plugin.rmsnorm_fn(x_of(n), weight_of(), None),
    "rmsnorm_dynamic_quant": lambda n: norm_plugin.rmsnorm_dynamic_quant(x_of(n), weight_of()),
    "rmsnorm_block_quant": lambda n: norm_plugin.rmsnorm_block_quant(x_of(n), weight_of(), x_of(n), group_size=16),
}


@pytest.mark.parametrize("name", CALLS)
def test_every_function_is_recognised_with_any_number_of_rows(name: str, recognised: list[bool]) -> None:
    for rows in (3, 4, 1):
        CALLS[name](rows)
    assert recognised == [False, True, True]


def test_parameters_and_tensors_take_turns(recognised: list[bool]) -> None:
    """The weight of a layer is a Parameter; under no_grad its gradient does not matter."""
    x, weight = x_of(), weight_of()
    with torch.no_grad():
        for w in (torch.nn.Parameter(weight), weight) * 2:
            norm_plugin.rmsnorm(x, w)
    assert recognised == [False, False, True, True]


# --- what differs -------------------------------------------------------------------------------------------------

#: Calls of rmsnorm other than rmsnorm(x, weight).
OTHERS: dict[str, Callable[[], Any]] = {
    "another dtype": lambda: norm_plugin.rmsnorm(x_of(dtype=torch.float16), weight_of()),
    "another dtype of the weight": lambda: norm_plugin.rmsnorm(x_of(), weight_of().float()),
    "another width": lambda: norm_plugin.rmsnorm(x_of(width=64), weight_of(64)),
    "other strides": lambda: norm_plugin.rmsnorm(layouts.padded(x_of()), weight_of()),
    "another rank": lambda: norm_plugin.rmsnorm(x_of().view(2, 2, WIDTH), weight_of()),
    "one row without a dimension for it": lambda: norm_plugin.rmsnorm(x_of()[0], weight_of()),
    "no weight": lambda: norm_plugin.rmsnorm(x_of(), None),
    "another eps": lambda: norm_plugin.rmsnorm(x_of(), weight_of(), 1e-5),
    "other numerics": lambda: norm_plugin.rmsnorm(x_of(), weight_of(), numerics="hf"),
    "Gemma": lambda: norm_plugin.gemma_rmsnorm(x_of(), weight_of()),
    "another launch": lambda: norm_plugin.rmsnorm(x_of(), weight_of(), enable_pdl=False),
    "a parameter": lambda: norm_plugin.rmsnorm(x_of(), torch.nn.Parameter(weight_of(), requires_grad=False)),
    "a gradient": lambda: norm_plugin.rmsnorm(x_of().requires_grad_(), weight_of()),
    "a gradient of the weight": lambda: norm_plugin.rmsnorm(x_of(), weight_of().requires_grad_()),
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_call_is_not_recognised(what: str, recognised: list[bool]) -> None:
    x, weight = x_of(), weight_of()
    expected = [norm_plugin.rmsnorm(x, weight) for _ in range(2)]
    OTHERS[what]()
    assert twins.same_bits(norm_plugin.rmsnorm(x, weight), expected[0])
    assert recognised == [False, True, False, True]


def test_a_weight_is_not_recognised_where_there_was_none(recognised: list[bool]) -> None:
    x, weight = x_of(), weight_of()
    plain = [norm_plugin.layernorm(x, None, None) for _ in range(2)]
    with_bias = norm_plugin.layernorm(x, None, weight)
    with_weight = norm_plugin.layernorm(x, weight, None)
    assert recognised == [False, True, False, False]
    assert len({tuple(t.flatten().tolist()) for t in (plain[1], with_bias, with_weight)}) == 3


def test_only_rows_may_be_another_number(recognised: list[bool]) -> None:
    """The first size of a matrix of weights is not a number of rows."""
    x = x_of()
    for features in (5, 5, 6):
        linear_weight = x_of(features, seed=3)
        assert norm_plugin.layernorm_linear(x, None, None, linear_weight, None).shape == (4, features)
    assert recognised == [False, True, False]


# --- what is refused stays refused --------------------------------------------------------------------------------


def test_tensors_that_do_not_fit_together_are_refused_after_good_calls(recognised: list[bool]) -> None:
    weight = weight_of()
    for _ in range(2):
        norm_plugin.add_rmsnorm(x_of(4), x_of(4), weight)
        norm_plugin.rmsnorm(x_of(4), weight, out=x_of(4))
        norm_plugin.fused_add_rmsnorm(x_of(4), x_of(4, seed=2), weight)
    recognised.clear()
    with pytest.raises(ValueError, match="residual has shape"):
        norm_plugin.add_rmsnorm(x_of(4), x_of(5), weight)
    with pytest.raises(ValueError, match="out has shape"):
        norm_plugin.rmsnorm(x_of(4), weight, out=x_of(3))
    x = x_of(4)
    with pytest.raises(ValueError, match="are the same memory"):
        norm_plugin.fused_add_rmsnorm(x, x, weight)
    assert twins.same_bits(x, x_of(4))
    assert recognised == [False] * 3


def test_a_signature_whose_tensors_lie_among_each_other_is_kept_once(recognised: list[bool]) -> None:
    """Its calls take the ordinary road, but calls of other signatures must not."""
    weight, wide = weight_of(), x_of(width=2 * WIDTH)
    left, right = wide[:, :WIDTH], wide[:, WIDTH:]
    norm_plugin.rmsnorm(x_of(), weight, out=x_of())
    for _ in range(2 * shortcut.MOST_PLANS):
        norm_plugin.rmsnorm(left, weight, out=right)
    norm_plugin.rmsnorm(x_of(), weight, out=x_of())
    assert recognised == [False] * (1 + 2 * shortcut.MOST_PLANS) + [True]


@pytest.mark.parametrize("shape", [(WIDTH,), (4, WIDTH)], ids=["one row without a dimension for it", "rows"])
def test_tensors_that_share_a_part_are_refused_after_good_calls(shape: tuple[int, ...], recognised: list[bool]) -> None:
    weight, apart = weight_of(), [x_of(seed=seed).flatten()[-math.prod(shape) :].view(shape) for seed in (1, 2)]
    for _ in range(2):
        norm_plugin.rmsnorm(apart[0], weight, out=apart[1])
        norm_plugin.fused_add_rmsnorm(*apart, weight)
    assert recognised == [False, False, True, True]
    size = math.prod(shape)
    base = x_of(8).flatten()
    for first, second in ((0, 16), (16, 0), (0, size - 1)):
        a, b = (base[start : start + size].view(shape) for start in (first, second))
        with pytest.raises(ValueError, match="overlap in memory"):
            norm_plugin.rmsnorm(a, weight, out=b)
        with pytest.raises(ValueError, match="overlap in memory"):
            norm_plugin.fused_add_rmsnorm(a, b, weight)
    for half in (base[8 : 8 + WIDTH], base[size - 1 : size - 1 + WIDTH]):  # the weight lies in what is written
        with pytest.raises(ValueError, match="overlap in memory"):
            norm_plugin.rmsnorm(apart[0], half, out=base[:size].view(shape))


def test_new_settings_forget_what_was_known(recognised: list[bool]) -> None:
    x, weight = x_of(), weight_of()
    for _ in range(2):
        norm_plugin.rmsnorm(x, weight)
    with settings.override(backend="native"):
        for _ in range(2):
            norm_plugin.rmsnorm(x, weight)
        assert dispatch.calls("rmsnorm", "native") == 2
    norm_plugin.rmsnorm(x, weight)
    assert recognised == [False, True, False, False, False]


def test_the_latest_signatures_are_kept(recognised: list[bool]) -> None:
    widths = range(16, 16 + 8 * (shortcut.MOST_PLANS + 1), 8)
    for width in widths:
        norm_plugin.rmsnorm(x_of(width=width), None)
    assert len(ops.RMSNORM.plans) == shortcut.MOST_PLANS
    recognised.clear()
    for width in reversed(widths):
        norm_plugin.rmsnorm(x_of(width=width), None)
    assert recognised == [True] * shortcut.MOST_PLANS + [False]


def test_a_torch_without_guards_takes_the_ordinary_road(
    monkeypatch: pytest.MonkeyPatch, recognised: list[bool]
) -> None:
    monkeypatch.setattr(shortcut, "dynamo_guards", None)
    x, weight = x_of(), weight_of()
    results = [norm_plugin.rmsnorm(x, weight) for _ in range(3)]
    assert recognised == [False] * 3
    assert all(twins.same_bits(result, results[0]) for result in results)
    assert dispatch.calls("rmsnorm", "triton") == 3


def test_a_linear_weight_of_another_height_is_not_taken_for_the_one_before() -> None:
    """Only tensors of rows may change their first size. For others, the bias would no longer be checked against it."""
    x, bias = torch.randn(4, 64, device=DEVICE), torch.randn(8, device=DEVICE)
    norm_plugin.layernorm_linear(x, None, None, torch.randn(8, 64, device=DEVICE), bias)
    with pytest.raises(ValueError, match=r"linear_bias has shape \[8\]"):
        norm_plugin.layernorm_linear(x, None, None, torch.randn(16, 64, device=DEVICE), bias)
