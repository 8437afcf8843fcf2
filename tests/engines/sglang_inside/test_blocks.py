"""Which blocks leave their sum to the next norm, on models made like those of SGLang 0.5.17.

A projection has half of a sum, and completing it is to double it.
"""

import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from sglang.srt import runtime_context
from torch import nn

from norm_plugin.engines import sglang_blocks
from norm_plugin.engines.sglang_blocks import MARK

FLAGS = SimpleNamespace(fuse_mlp_allreduce=False)


@contextmanager
def scoped(fuse_mlp_allreduce):
    FLAGS.fuse_mlp_allreduce = fuse_mlp_allreduce
    yield
    FLAGS.fuse_mlp_allreduce = False


@pytest.fixture(autouse=True)
def older(monkeypatch):
    monkeypatch.setattr(runtime_context, "get_forward", lambda: SimpleNamespace(scoped=scoped))
    asked = SimpleNamespace(apply_flashinfer_allreduce_fusion=lambda rows: rows > 0)
    monkeypatch.setitem(sys.modules, "sglang.srt.layers.communicator", asked)


class RowParallelLinear(nn.Module):
    reduce_results = True

    def forward(self, x):
        return x.clone() if FLAGS.fuse_mlp_allreduce else 2 * x


class RowParallelLinearWithLoRA(RowParallelLinear):
    def forward(self, x):
        return 2 * x


class Part(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.down_proj = self.o_proj = linear()

    def forward(self, hidden_states):
        return self.down_proj(hidden_states)


class Norm(nn.Module):
    """It says what it was given."""

    def forward(self, x, residual=None):
        return ("whole", x, residual)

    def forward_with_allreduce_fusion(self, x, residual=None):
        return ("part", *self(2 * x, residual)[1:])


class Layer(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.self_attn, self.mlp = Part(linear), Part(linear)
        self.input_layernorm, self.post_attention_layernorm = Norm(), Norm()


def model(name, *, decoder="", linear=RowParallelLinear, communicators=False):
    kind = type(f"{decoder or 'Other'}DecoderLayer", (Layer,), {})
    made = type(name, (nn.Module,), {})()
    made.model = type(f"{decoder or 'Other'}Model", (nn.Module,), {})()
    type(made.model).__module__ = f"sglang.srt.models.{(decoder or 'other').lower()}"
    made.model.layers, made.model.layers_to_capture = nn.ModuleList(kind(linear) for _ in range(3)), []
    for layer in made.model.layers if communicators else ():
        layer.layer_communicator = SimpleNamespace(is_last_layer=False)
    return made


def left(made):
    """Which parts leave their sum: of each layer the attention and the feed-forward. Every norm has a whole sum."""
    marks, x, residual = [], torch.ones(2, 4), torch.zeros(2, 4)
    norms = [*[n for i in made.model.layers for n in (i.input_layernorm, i.post_attention_layernorm)][1:], Norm()]
    for layer in made.model.layers:
        for part, call in ((layer.self_attn, {"hidden_states": x}), (layer.mlp, {"hidden_states": x})):
            out = part(**call)
            marks.append(getattr(out, MARK, False))
            norm = norms.pop(0)
            if not hasattr(layer, "layer_communicator"):
                said, whole, same = norm(out, residual)
                assert said == ("part" if marks[-1] else "whole")
                assert torch.equal(whole, 2 * x)
                assert same is residual
    return marks


@pytest.mark.parametrize(
    ("name", "decoder", "expected"),
    [
        ("Qwen3NextForCausalLM", "", [False, False, True]),
        ("Qwen3ForCausalLM", "Qwen3", [False, False, True]),
        ("Qwen3VLMoeForConditionalGeneration", "", [True, True, True]),
        ("FalconH1ForCausalLM", "", [True, True, True]),
    ],
)
def test_whose_communicators_leave_sums(hooks, name, decoder, expected):
    made = model(name, decoder=decoder, communicators=True)
    sglang_blocks.prepare(made, hooks)
    assert [layer.layer_communicator.is_last_layer for layer in made.model.layers] == expected
    hooks.undo()
    assert not any(layer.layer_communicator.is_last_layer for layer in made.model.layers)


def test_qwen3_leaves_the_sums_of_feed_forwards_to_communicators(hooks):
    made = model("Qwen3ForCausalLM", decoder="Qwen3", communicators=True)
    sglang_blocks.prepare(made, hooks)
    assert left(made) == [False, True, False, True, False, False]


@pytest.mark.parametrize("decoder", ["Llama", "Qwen2"])
def test_all_sums_but_the_last_are_left(hooks, decoder):
    made = model("Any", decoder=decoder)
    assert not any(left(made))
    sglang_blocks.prepare(made, hooks)
    assert left(made) == [True, True, True, True, True, False]
    made.model.layers_to_capture.append(1)
    assert not any(left(made))
    made.model.layers_to_capture.clear()
    assert any(left(made))
    hooks.undo()
    assert not any(left(made))


def test_no_sum_is_left_where_nobody_is_asked(hooks):
    made = model("Any", decoder="Llama")
    sglang_blocks.prepare(made, hooks)
    sys.modules["sglang.srt.layers.communicator"].apply_flashinfer_allreduce_fusion = lambda rows: False
    assert not any(left(made))


def test_lora_completes_its_sums(hooks):
    made = model("Any", decoder="Llama", linear=RowParallelLinearWithLoRA)
    sglang_blocks.prepare(made, hooks)
    assert not any(left(made))


def test_a_compiler_sees_whole_sums(hooks, monkeypatch):
    made = model("Any", decoder="Llama")
    sglang_blocks.prepare(made, hooks)
    monkeypatch.setattr(sglang_blocks, "traced", lambda: True)
    assert not any(left(made))


@pytest.mark.parametrize("decoder", ["", "Llama"])
def test_others_stay_as_they_are(hooks, decoder, monkeypatch):
    """No other decoder is known, and layer boundaries have projections that complete nothing."""
    monkeypatch.setattr(RowParallelLinear, "reduce_results", not decoder)
    made = model("Any", decoder=decoder)
    sglang_blocks.prepare(made, hooks)
    assert not any("forward" in vars(module) for module in made.modules())
