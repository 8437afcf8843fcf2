"""What stands in the place of an engine's method: it answers, or leaves a call to the engine, which is counted."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from norm_plugin import settings
from norm_plugin.dispatch import BackendError, Declined
from norm_plugin.engines import call_counts, qk_norms
from norm_plugin.engines.common import LeftToEngine, replacement
from norm_plugin.engines.installed_hooks import InstalledHooks


class Norm(nn.Module):
    """An engine's layer: its own answer is x + 1."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor, reason: str = "") -> Tensor:
        return x + 1


def norm_fn(x: Tensor, weight: Tensor, reason: str = "") -> Tensor:
    """A function of the engine's."""
    return x + 1


def ours(layer: Any, x: Tensor, reason: str = "") -> Tensor | LeftToEngine:
    if reason == "refused by a kernel":
        raise Declined("rmsnorm", reason)
    return LeftToEngine("rmsnorm", reason) if reason else x + 2


def our_fn(x: Tensor, weight: Tensor, reason: str = "") -> Tensor | LeftToEngine:
    return ours(None, x, reason)


@pytest.fixture
def hooks(monkeypatch: pytest.MonkeyPatch) -> Iterator[InstalledHooks]:
    call_counts.reset()
    made = InstalledHooks("engine", "1")
    module: Any = SimpleNamespace(__name__="engine.norms", Norm=Norm)
    made.replace_method(module, "Norm", "forward", lambda f: replacement(made, ("rmsnorm", "qknorm"), f, ours))
    yield made
    made.undo()
    call_counts.reset()


REASONS = ("an odd argument", "refused by a kernel")


@pytest.mark.parametrize("reason", REASONS)
def test_a_call_that_is_left_is_counted_at_its_layer(hooks: InstalledHooks, reason: str) -> None:
    layer, x = Norm(), torch.zeros(2, 4)
    call_counts.name_layers(nn.ModuleDict({"norm": layer}))
    assert torch.equal(layer(x, reason), x + 1)
    assert torch.equal(layer(x=x, reason=reason), x + 1)
    assert torch.equal(layer(x), x + 2)
    assert [(row.layer[0], row.op, row.reason, row.calls) for row in call_counts.rows()] == [
        ("norm", "rmsnorm", reason, 2)
    ]


@pytest.mark.parametrize("reason", REASONS)
def test_a_function_knows_its_weight(hooks: InstalledHooks, reason: str) -> None:
    layer, x = Norm(), torch.zeros(2, 4)
    call_counts.name_layers(nn.ModuleDict({"norm": layer}))
    function = replacement(hooks, ("gated",), norm_fn, our_fn)
    function(x, layer.weight, reason)
    function(reason=reason, weight=layer.weight, x=x)
    assert [(row.layer[0], row.reason, row.calls) for row in call_counts.rows()] == [("norm", reason, 2)]


@pytest.mark.parametrize("reason", REASONS)
def test_strict_forbids_it_where_there_are_rows(hooks: InstalledHooks, reason: str) -> None:
    with settings.override(strict=True):
        with pytest.raises(BackendError, match=rf"rmsnorm of \[2, 4\] torch.float32 is left to the engine: {reason}\."):
            Norm()(torch.zeros(2, 4), reason)
        assert Norm()(torch.zeros(0, 4), reason).shape == (0, 4)
    assert call_counts.calls("rmsnorm", reason) == 1


def test_a_method_that_somebody_kept_is_the_engines_after_undo(hooks: InstalledHooks) -> None:
    bound, x = Norm().forward, torch.zeros(2, 4)
    assert torch.equal(bound(x), x + 2)
    hooks.undo()
    assert torch.equal(bound(x), x + 1)


def test_a_family_that_is_left_out_has_the_engines(hooks: InstalledHooks) -> None:
    hooks.undo()
    module: Any = SimpleNamespace(__name__="engine.norms", Norm=Norm)
    model = nn.ModuleDict({"q_norm": Norm(), "norm": Norm()})
    qk_norms.learn(model)
    with settings.override(ops=frozenset({"qknorm"})):
        hooks.replace_method(module, "Norm", "forward", lambda f: replacement(hooks, ("rmsnorm", "qknorm"), f, ours))
    x = torch.zeros(2, 4)
    assert torch.equal(model["q_norm"](x), x + 2)
    assert torch.equal(model["norm"](x), x + 1)


@pytest.mark.parametrize("in_graphs", [False, True])
def test_what_a_compiler_traces(in_graphs: bool, hooks: InstalledHooks) -> None:
    function = replacement(hooks, ("gated",), norm_fn, our_fn, in_graphs)
    compiled = torch.compile(function, backend="eager", fullgraph=True)
    x, weight = torch.zeros(2, 4), torch.ones(4)
    assert torch.equal(compiled(x, weight), x + 2 if in_graphs else x + 1)
    assert torch.equal(compiled(x, weight, "an odd argument"), x + 1)
    assert call_counts.rows() == ()


def test_a_class_that_is_not_there_is_a_missing_hook(hooks: InstalledHooks) -> None:
    module: Any = SimpleNamespace(__name__="engine.norms")
    assert not hooks.replace_method(module, "Norm", "forward", lambda f: f)
    assert hooks.missing == {"Norm": "engine.norms has no Norm"}
