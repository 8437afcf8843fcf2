"""Which feed-forwards leave their sum to the next layer, on models made like those of SGLang 0.5.17."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from sglang.srt import runtime_context
from torch import nn

from norm_plugin.engines import sglang_communicators


class Communicator:
    is_last_layer = False

    def should_fuse_mlp_allreduce_with_next_layer(self, batch):
        return not self.is_last_layer


class RowParallelLinear(nn.Module):
    """It completes its sum unless SGLang's flag says that somebody else will."""

    def forward(self, x):
        return x if FLAGS.fuse_mlp_allreduce else 2 * x


class RowParallelLinearWithLoRA(nn.Module):
    def forward(self, x):
        return 2 * x


class Feed(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.down_proj = linear

    def forward(self, x, forward_batch=None):
        return self.down_proj(x)


class Layer(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.layer_communicator, self.mlp = Communicator(), Feed(linear)


FLAGS = SimpleNamespace(fuse_mlp_allreduce=False)


@contextmanager
def scoped(fuse_mlp_allreduce):
    FLAGS.fuse_mlp_allreduce = fuse_mlp_allreduce
    yield
    FLAGS.fuse_mlp_allreduce = False


def model(name, linear=RowParallelLinear):
    made = type(name, (nn.Module,), {})()
    made.model = nn.Module()
    made.model.layers = nn.ModuleList(Layer(linear()) for _ in range(3))
    made.model.layers_to_capture = []
    return made


def last(made):
    return [layer.layer_communicator.is_last_layer for layer in made.model.layers]


def left(made):
    """Of which layers the sum is left; all others must be complete."""
    x = torch.ones(2, 4)
    answers = [layer.mlp(x, forward_batch=None) for layer in made.model.layers]
    marked = [getattr(out, "_sglang_needs_allreduce_fusion", False) for out in answers]
    assert all(torch.equal(out, x if mark else 2 * x) for out, mark in zip(answers, marked, strict=True))
    return marked


@pytest.fixture(autouse=True)
def flags(monkeypatch):
    monkeypatch.setattr(runtime_context, "get_forward", lambda: SimpleNamespace(scoped=scoped))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Qwen3NextForCausalLM", [False, False, True]),
        ("Qwen3ForCausalLM", [False, False, True]),
        ("Qwen3VLMoeForConditionalGeneration", [True, True, True]),
        ("FalconH1ForCausalLM", [True, True, True]),
    ],
)
def test_whose_sums_are_left(hooks, name, expected):
    made = model(name)
    sglang_communicators.prepare(made, hooks)
    assert last(made) == expected
    hooks.undo()
    assert last(made) == [False, False, False]


def test_qwen3_leaves_all_sums_but_the_last(hooks):
    made = model("Qwen3ForCausalLM")
    assert left(made) == [False, False, False]
    sglang_communicators.prepare(made, hooks)
    assert left(made) == [True, True, False]
    made.model.layers_to_capture.append(1)
    assert left(made) == [False, False, False]
    made.model.layers_to_capture.clear()
    assert left(made) == [True, True, False]
    hooks.undo()
    assert left(made) == [False, False, False]


def test_lora_completes_its_sums(hooks):
    made = model("Qwen3ForCausalLM", RowParallelLinearWithLoRA)
    sglang_communicators.prepare(made, hooks)
    assert left(made) == [False, False, False]


def test_models_with_layer_boundaries_stay_as_they_are(hooks):
    sglang_communicators.prepare(nn.Linear(2, 2), hooks)
