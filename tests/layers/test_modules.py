"""The layers as modules: parameters, attributes, copies, and what their constructors and calls refuse."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

from norm_plugin.accuracy import bounds, ulps
from norm_plugin.layers import GemmaRMSNorm, LayerNorm, LayerNormGated, RMSNorm, RMSNormGated
from tests.layers.samples import DTYPES, LAYERS, WIDTH, draw, randomized


@pytest.mark.parametrize(
    ("layer", "names"),
    [
        (RMSNorm(8), ["weight"]),
        (RMSNorm(8, has_weight=False), []),
        (RMSNorm(8, elementwise_affine=False), []),
        (GemmaRMSNorm(8), ["weight"]),
        (LayerNorm(8), ["weight", "bias"]),
        (LayerNorm(8, bias=False), ["weight"]),
        (LayerNorm(8, elementwise_affine=False), []),
        (RMSNormGated(8), ["weight"]),
        (LayerNormGated(8), ["weight", "bias"]),
    ],
    ids=lambda value: str(value) if isinstance(value, nn.Module) else "",
)
def test_state_dict(layer: nn.Module, names: list[str]) -> None:
    """Exactly the parameters that checkpoints of vLLM, SGLang, mamba_ssm and torch have for such a layer."""
    assert list(layer.state_dict()) == [name for name, _ in layer.named_parameters()] == names
    layer.load_state_dict({name: torch.arange(8.0) for name in names}, strict=True)
    assert all(torch.equal(parameter, torch.arange(8.0)) for parameter in layer.parameters())


def test_what_engines_read() -> None:
    layer = RMSNorm(8, 1e-4, 4, weight_dtype=torch.bfloat16)
    assert (layer.hidden_size, layer.variance_epsilon, layer.variance_size_override) == (8, 1e-4, 4)
    assert (layer.has_weight, layer.weight.dtype) == (True, torch.bfloat16)
    assert RMSNorm(8, 1e-4, 8).variance_size_override is None
    assert [RMSNorm(8, numerics=name).cast_x_before_out_mul for name in (None, "hf")] == [False, True]
    bare = RMSNorm(8, has_weight=False).to(torch.bfloat16)
    assert not bare.has_weight
    assert torch.equal(bare.weight, torch.ones(8, dtype=torch.bfloat16))
    assert RMSNorm(8, elementwise_affine=False).weight is None
    assert RMSNormGated(8).bias is None


def test_without_weight_any_width_may_be_normalized() -> None:
    x = draw(4, WIDTH, seed=0)
    expected = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    for layer in (RMSNorm(0, has_weight=False), RMSNorm(WIDTH, has_weight=False)):
        assert ulps.excess(layer(x), bounds.rmsnorm(x, None), expected) == 0


@pytest.mark.parametrize("make", LAYERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_copies_compute_the_same(make: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    layer = randomized(make(), dtype)
    x = draw(4, WIDTH, seed=0, dtype=dtype)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
    assert layer(x).dtype == dtype
    assert all(p.dtype == dtype for p in layer.parameters())


@pytest.mark.parametrize("make", LAYERS)
def test_parameters_can_be_reset_and_made_late(make: Callable[[], nn.Module]) -> None:
    fresh, used = make(), randomized(make())
    used.reset_parameters()
    late = type(fresh)(WIDTH, device="meta").to_empty(device="cpu")
    late.reset_parameters()
    for layer in (used, late):
        assert all(map(torch.equal, layer.parameters(), fresh.parameters()))


def test_repr_says_what_differs() -> None:
    assert str(RMSNorm(8, numerics="hf")) == "RMSNorm(8, eps=1e-06, has_weight=True, numerics=hf)"
    assert (
        str(LayerNorm((2, 4), bias=False))
        == "LayerNorm((2, 4), eps=1e-05, elementwise_affine=True, bias=False, numerics=fp32)"
    )
    assert str(RMSNormGated(8)) == (
        "RMSNormGated(8, eps=1e-05, group_size=None, norm_before_gate=False, activation=swish, numerics=fp32)"
    )


X = torch.ones(2, 8)


@pytest.mark.parametrize(
    ("act", "error", "says"),
    [
        (
            lambda: RMSNorm(8, 1e-6, True),
            TypeError,
            ["var_hidden_size is True", "must be a size", "elementwise_affine"],
        ),
        (lambda: RMSNorm(8, 1e-6, 9), ValueError, ["variance_size is 9", "1..8"]),
        (lambda: RMSNorm(8, 1e-6, 0), ValueError, ["variance_size is 0", "1..8"]),
        (lambda: RMSNorm(8, 1e-6, None, True), TypeError, ["positional"]),
        (lambda: RMSNorm(8, numerics="bf32"), ValueError, ["numerics is 'bf32'", "fp32, hf, vllm_c, sgl_jit"]),
        (
            lambda: RMSNorm(8, numerics="fp32", cast_x_before_out_mul=True),
            ValueError,
            ["numerics is 'fp32'", "cast_x_before_out_mul True", "'hf'"],
        ),
        (
            lambda: RMSNorm(8, dtype=torch.float16, weight_dtype=torch.float32),
            ValueError,
            ["dtype is torch.float16", "weight_dtype torch.float32", "Give one"],
        ),
        (
            lambda: RMSNorm(8, override_orig_dtype=torch.float16),
            ValueError,
            ["override_orig_dtype is torch.float16", "must be None", "Cast x"],
        ),
        (lambda: RMSNorm(8, x_pad_to_multiple=256), ValueError, ["x_pad_to_multiple is 256", "must be 0", "Pad"]),
        (lambda: RMSNorm(0), ValueError, ["weight has shape [0]", "at least one element"]),
        (lambda: RMSNorm(9)(X), ValueError, ["x has shape [2, 8]", "must end in [9]", "RMSNorm"]),
        (lambda: RMSNorm((4, 2))(X), ValueError, ["x has shape [2, 8]", "must end in [4, 2]"]),
        (lambda: RMSNorm(9, has_weight=False)(X), ValueError, ["x has shape [2, 8]", "must end in [9]"]),
        (lambda: LayerNorm(9)(X), ValueError, ["x has shape [2, 8]", "must end in [9]", "LayerNorm"]),
        (lambda: GemmaRMSNorm(8)(X, X[:, :4]), ValueError, ["residual has shape [2, 4]", "must end in [8]"]),
        (lambda: RMSNorm(8)(X, X[:1]), ValueError, ["residual has shape [1, 8]", "[2, 8]"]),
        (lambda: RMSNorm(8)(X, X[:1], X), ValueError, ["residual has shape [1, 8]", "[2, 8]"]),
        (lambda: RMSNorm(8)(X, X, X[:1]), ValueError, ["post_residual_addition has shape [1, 8]", "[2, 8]"]),
        (lambda: RMSNorm(8)(X, None, X), ValueError, ["post_residual_addition is given", "residual is None"]),
        (lambda: RMSNorm(8)(X, X, X.half()), TypeError, ["post_residual_addition has dtype torch.float16", "Cast it"]),
        (lambda: RMSNorm(8)(X.long()), TypeError, ["dtype int64", "Cast it"]),
        (lambda: RMSNormGated(8, group_size=3), ValueError, ["group_size is 3", "must divide", "8"]),
        (lambda: GemmaRMSNorm(8, numerics="torch"), ValueError, ["numerics is 'torch'", "fp32, hf, vllm_c, sgl_jit"]),
        (lambda: LayerNorm(8, numerics="hf"), ValueError, ["numerics is 'hf'", "fp32, torch"]),
        (lambda: RMSNormGated(8, numerics="vllm_c"), ValueError, ["numerics is 'vllm_c'", "torch, torch_hf"]),
        (lambda: LayerNormGated(8, activation="relu"), ValueError, ["activation is 'relu'", "silu, swish, sigmoid"]),
        (lambda: RMSNormGated(8)(X, X[:1]), ValueError, ["z has shape [1, 8]", "[2, 8]"]),
    ],
)
def test_refusals(act: Callable[[], object], error: type[Exception], says: list[str]) -> None:
    with pytest.raises(error) as caught:
        act()
    for words in says:
        assert words in str(caught.value)
