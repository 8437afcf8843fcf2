"""What the layers compute: against torch's modules in fp64, and bit by bit against the engines' own steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from norm_plugin import layernorm_fn, rmsnorm, rmsnorm_fn
from norm_plugin.accuracy import bounds, ulps
from norm_plugin.layers import GemmaRMSNorm, LayerNorm, LayerNormGated, RMSNorm, RMSNormGated
from tests.layers.samples import DTYPES, GROUP, WIDTH, draw, randomized


@pytest.fixture(autouse=True)
def _values_only() -> Iterator[None]:
    with torch.no_grad():
        yield


# --- against torch's modules, in fp64 -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("eps", [1e-6, 1e-2])
@pytest.mark.parametrize("shape", [WIDTH, (WIDTH,), [WIDTH], torch.Size([4, 24]), (2, 4, 12)])
def test_rmsnorm_is_torchs(shape: int | tuple[int, ...], eps: float, dtype: torch.dtype) -> None:
    theirs = randomized(nn.RMSNorm(shape, eps), dtype)
    ours = RMSNorm(shape, eps, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    x = draw(3, 5, *theirs.normalized_shape, seed=0, dtype=dtype)
    y, rows = ours(x), x.reshape(15, WIDTH)
    assert y.shape == x.shape
    assert y.dtype == dtype
    off = bounds.rmsnorm(rows, theirs.weight.flatten(), eps=eps).reshape(x.shape)
    assert ulps.excess(y, off, theirs.double()(x.double())) == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_rmsnorm_without_eps_is_torchs(dtype: torch.dtype) -> None:
    x = draw(4, WIDTH, seed=0).mul(1e-4).to(dtype)  # so small that eps decides
    ours, theirs = RMSNorm(WIDTH, None, dtype=dtype)(x), nn.RMSNorm(WIDTH, dtype=dtype)(x)
    # two correct roundings of almost the same value are at most one ulp apart; in fp32 the sums differ as well
    allowed = 1 if dtype != torch.float32 else 4
    assert ((ours - theirs).double().abs() <= allowed * ulps.size(theirs.double(), dtype)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("affine", [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("shape", [WIDTH, (4, 24)])
def test_layernorm_is_torchs(shape: int | tuple[int, ...], affine: tuple[bool, bool], dtype: torch.dtype) -> None:
    theirs = randomized(nn.LayerNorm(shape, 1e-3, *affine), dtype)
    ours = LayerNorm(shape, 1e-3, *affine, dtype=dtype)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    x = draw(3, *theirs.normalized_shape, seed=0, dtype=dtype)
    weight, bias = (p if p is None else p.flatten() for p in (theirs.weight, theirs.bias))
    off = bounds.layernorm(x.reshape(3, WIDTH), weight, bias, 1e-3).reshape(x.shape)
    assert ulps.excess(ours(x), off, theirs.double()(x.double())) == 0


def test_defaults() -> None:
    assert RMSNorm(8).eps == GemmaRMSNorm(8).eps == 1e-6
    assert LayerNorm(8).eps == nn.LayerNorm(8).eps
    assert RMSNormGated(8).eps == LayerNormGated(8).eps == 1e-5
    assert not RMSNormGated(8).norm_before_gate  # vLLM's
    assert LayerNormGated(8).norm_before_gate  # mamba_ssm's


# --- against the engines' steps, bit by bit -----------------------------------------------------------------------


def sglang_steps(
    weight: Tensor,
    x: Tensor,
    residual: Tensor | None,
    addition: Tensor | None,
    columns: int | None,
    fp32_residual: bool,
    cast: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """The reference that SGLang's RMSNorm documents, step by step."""
    h = x.float()
    if residual is not None:
        h = h + residual.float()
        h = h if addition is None else h + addition.float()
        new_residual = h.clone() if fp32_residual else h.to(x.dtype)
    h = h * torch.rsqrt(h[..., :columns].pow(2).mean(dim=-1, keepdim=True) + 1e-5)
    out = weight * h.to(x.dtype) if cast else (h * weight).to(x.dtype)
    return out if residual is None else (out, new_residual)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("fp32_residual", [False, True])
@pytest.mark.parametrize("var_hidden_size", [None, 64, WIDTH])
def test_rmsnorm_takes_sglangs_steps(
    var_hidden_size: int | None, fp32_residual: bool, cast: bool, dtype: torch.dtype
) -> None:
    layer = RMSNorm(WIDTH, 1e-5, var_hidden_size, cast_x_before_out_mul=cast, fp32_residual=fp32_residual, dtype=dtype)
    weight = randomized(layer).weight
    x, residual, addition = (draw(4, 5, WIDTH, seed=seed, dtype=dtype) for seed in range(3))
    before = [t.clone() for t in (x, residual, addition)]
    for given in ((None, None), (residual, None), (residual, addition)):
        expected = sglang_steps(weight, x, *given, var_hidden_size, fp32_residual, cast)
        torch.testing.assert_close(layer(x, *given), expected, rtol=0, atol=0)
    assert all(map(torch.equal, before, (x, residual, addition)))  # nothing is written in place


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_rmsnorm_takes_vllms_steps(weight_dtype: torch.dtype) -> None:
    """vLLM rounds to the weight's dtype before the weight: hf for a bf16 weight, fp32 for a wider one."""
    numerics = "hf" if weight_dtype == torch.bfloat16 else "fp32"
    layer = RMSNorm(WIDTH, 1e-6, 64, weight_dtype=weight_dtype, numerics=numerics)
    weight = randomized(layer, weight_dtype).weight.detach()
    x, residual = (draw(6, WIDTH, seed=seed, dtype=torch.bfloat16) for seed in range(2))
    total = x.float() + residual.float()
    variance = total[:, :64].pow(2).mean(dim=-1, keepdim=True)
    out = ((total * torch.rsqrt(variance + 1e-6)).to(weight_dtype) * weight).to(x.dtype)
    torch.testing.assert_close(layer(x, residual), (out, total.to(x.dtype)), rtol=0, atol=0)


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("numerics", ["vllm_c", "sgl_jit"])
def test_rmsnorm_of_a_rounded_sum(numerics: str, added: bool) -> None:
    """As the engines' CUDA kernels: the output comes from the written sum, to which SGLang adds beforehand."""
    layer = randomized(RMSNorm(WIDTH, numerics=numerics), torch.bfloat16)
    x, residual, addition = (draw(6, WIDTH, seed=seed, dtype=torch.bfloat16) for seed in range(3))
    base = residual + addition if added else residual
    total, w = x.float() + base.float(), layer.weight.detach().float()
    h = total.to(x.dtype).float()
    s = torch.rsqrt((h if numerics == "vllm_c" else total).pow(2).mean(-1, keepdim=True) + 1e-6)
    out = h * s * w if numerics == "vllm_c" else h * w * s
    expected = (out.to(x.dtype), h.to(x.dtype))
    torch.testing.assert_close(layer(x, residual, addition if added else None), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gemma_adds_one_in_fp32(dtype: torch.dtype) -> None:
    layer = GemmaRMSNorm(WIDTH, dtype=dtype)
    assert not layer.weight.any()
    with torch.no_grad():
        layer.weight.copy_(draw(WIDTH, seed=9) + 15.8125)  # 16.8125 is no bf16
    x, residual = (draw(4, 5, WIDTH, seed=seed, dtype=dtype) for seed in range(2))
    weight = layer.weight.double() + 1
    for given in (None, residual):
        h = x.double() if given is None else x.double() + given.double()
        truth = h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
        result = layer(x, given)
        out = result if given is None else result[0]
        assert ulps.excess(out, bounds.rmsnorm(x, layer.weight, given, gemma=True), truth) == 0
    assert torch.equal(result[1], (x.float() + residual.float()).to(dtype))


def gated_formula(layer: RMSNormGated | LayerNormGated, x: Tensor, z: Tensor | None) -> Tensor:
    act = {"swish": F.silu, "silu": F.silu, "sigmoid": torch.sigmoid}[layer.activation]
    h = x if z is None or layer.norm_before_gate else x * act(z)
    h = h.unflatten(-1, (-1, layer.group_size or layer.hidden_size))
    h = h if layer.is_rms_norm else h - h.mean(-1, keepdim=True)
    y = (h / (h.square().mean(-1, keepdim=True) + layer.eps).sqrt()).flatten(-2) * layer.weight.double()
    y = y if layer.bias is None else y + layer.bias.double()
    return y if z is None or not layer.norm_before_gate else y * act(z)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["swish", "sigmoid"])
@pytest.mark.parametrize("order", [{}, {"norm_before_gate": True}, {"norm_before_gate": False}])
@pytest.mark.parametrize("group_size", [None, GROUP])
@pytest.mark.parametrize("kind", [RMSNormGated, LayerNormGated])
def test_gated(
    kind: type[RMSNormGated | LayerNormGated],
    group_size: int | None,
    order: dict[str, bool],
    activation: str,
    dtype: torch.dtype,
) -> None:
    layer = randomized(kind(WIDTH, group_size=group_size, activation=activation, **order), dtype)
    x, z = (draw(4, 5, WIDTH, seed=seed, dtype=dtype) for seed in range(2))
    for gate in (z, None):
        wide_gate = None if gate is None else gate.double()
        how = (gate, layer.eps, group_size, layer.norm_before_gate, layer.is_rms_norm, activation)
        off = bounds.gated_norm(x, layer.weight, layer.bias, *how)
        assert ulps.excess(layer(x, gate), off, gated_formula(layer, x.double(), wide_gate)) == 0


# --- numerics by name ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "function"),
    [
        (GemmaRMSNorm(WIDTH, numerics="hf"), lambda x, layer: rmsnorm(x, layer.weight, numerics="hf", gemma=True)),
        (LayerNorm(WIDTH, numerics="torch"), lambda x, layer: F.layer_norm(x, (WIDTH,), layer.weight, layer.bias)),
        (
            RMSNormGated(WIDTH, numerics="hf"),
            lambda x, layer: rmsnorm_fn(x, layer.weight, None, x, 1e-5, None, False, numerics="hf"),
        ),
        (
            LayerNormGated(WIDTH, numerics="hf"),
            lambda x, layer: layernorm_fn(x, layer.weight, layer.bias, x, 1e-5, numerics="hf"),
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_layer_has_the_numerics_that_it_is_given(
    layer: nn.Module, function: Callable[[Tensor, nn.Module], Tensor]
) -> None:
    layer = randomized(layer, torch.bfloat16)
    x = draw(64, WIDTH, seed=0, dtype=torch.bfloat16)
    gate = [x] if "Gated" in type(layer).__name__ else []
    out = layer(x, *gate)
    assert torch.equal(out, function(x, layer))
    layer.numerics = "fp32"
    if not isinstance(layer, LayerNorm):  # which PyTorch rounds once, as we do
        assert not torch.equal(out, layer(x, *gate))
