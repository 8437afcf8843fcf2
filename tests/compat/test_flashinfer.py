"""FlashInfer's names, called with its argument names and rules, and compared with the fp32 formula that it
documents."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import norm_plugin
from norm_plugin.accuracy import ulps
from norm_plugin.compat import flashinfer

#: FlashInfer's arguments, by position or name. Ours may take more by name.
SIGNATURES = {
    "rmsnorm": "input, weight, eps=1e-06, out=None, enable_pdl=None",
    "fused_add_rmsnorm": "input, residual, weight, eps=1e-06, enable_pdl=None",
    "gemma_rmsnorm": "input, weight, eps=1e-06, out=None, enable_pdl=None",
    "gemma_fused_add_rmsnorm": "input, residual, weight, eps=1e-06, enable_pdl=None",
    "layernorm": "input, gemma, beta, eps=1e-06",
    "rmsnorm_quant": "out, input, weight, scale, eps=1e-06, enable_pdl=None",
    "fused_add_rmsnorm_quant": "out, input, residual, weight, scale, eps=1e-06, enable_pdl=None",
    "layernorm_quant": "out, input, gemma, beta, scale, eps=1e-06",
}
DTYPES = [torch.float16, torch.bfloat16]
FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]
M, N = 7, 256


def draw(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rms(h: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    h = h.double()
    return h / (h.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def assert_rounded(actual: Tensor, truth: Tensor, off: Tensor | float = 0.0) -> None:
    """One rounding, after 16 fp32 roundings of the value and of `off`, the terms that it is the sum of."""
    assert ulps.excess(actual, 16 * 2.0**-24 * (truth.abs() + off), truth) == 0


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name: str) -> None:
    parameters = inspect.signature(getattr(flashinfer, name)).parameters.values()
    taken = [p for p in parameters if p.kind is not p.KEYWORD_ONLY]
    written = [p.name if p.default is p.empty else f"{p.name}={p.default}" for p in taken]
    assert ", ".join(written) == SIGNATURES[name]


def test_every_name_is_public() -> None:
    assert sorted(flashinfer.__all__) == sorted(SIGNATURES)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(M, N), (3, 4, 64)])
@pytest.mark.parametrize("gemma", [False, True])
def test_rmsnorm(gemma: bool, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    norm = flashinfer.gemma_rmsnorm if gemma else flashinfer.rmsnorm
    x, weight = draw(*shape, seed=0, dtype=dtype), draw(shape[-1], seed=1, dtype=dtype)
    truth = rms(x, weight.double() + 1 if gemma else weight)
    assert_rounded(norm(x, weight), truth)
    out = torch.empty_like(x)
    assert norm(input=x, weight=weight, eps=1e-6, out=out, enable_pdl=False) is out
    assert_rounded(out, truth)
    norm(x, weight, out=x)
    assert torch.equal(x, out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gemma", [False, True])
def test_fused_add_rmsnorm_writes_both(gemma: bool, dtype: torch.dtype) -> None:
    norm = flashinfer.gemma_fused_add_rmsnorm if gemma else flashinfer.fused_add_rmsnorm
    wide = draw(M, 2 * N, seed=0, dtype=dtype)
    x, residual, weight = wide[:, :N], draw(M, N, seed=1, dtype=dtype), draw(N, seed=2, dtype=dtype)
    total, untouched = x.float() + residual.float(), wide[:, N:].clone()
    assert norm(input=x, residual=residual, weight=weight, eps=1e-6, enable_pdl=None) is None
    assert torch.equal(residual, total.to(dtype))
    assert torch.equal(wide[:, N:], untouched)
    # of the unrounded sum, because the rounded one has an error of up to half an ulp
    assert_rounded(x, rms(total, weight.double() + 1 if gemma else weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_layernorm(dtype: torch.dtype) -> None:
    x = draw(M, N, seed=0, dtype=dtype)
    gemma, beta = (draw(N, seed=seed, dtype=torch.float32) for seed in (1, 2))  # FlashInfer's: bf16 in, fp32 weights
    truth = F.layer_norm(x.double(), (N,), gemma.double(), beta.double(), 0.5)
    # 6: no element of a normal row this long lies further out; its terms are x * gemma and beta
    assert_rounded(
        flashinfer.layernorm(input=x, gemma=gemma, beta=beta, eps=0.5), truth, off=6 * float(gemma.abs().max())
    )


@pytest.mark.parametrize("out_dtype", FP8)
def test_static_quant(out_dtype: torch.dtype) -> None:
    x, residual = (draw(M, N, seed=seed, dtype=torch.bfloat16) for seed in range(2))
    weight, beta = (draw(N, seed=seed, dtype=torch.bfloat16) for seed in (2, 3))
    scale = torch.tensor(0.003, dtype=torch.float32)  # so small that some of e4m3 saturate
    total = x.float() + residual.float()
    out, most = torch.empty(M, N, dtype=out_dtype), torch.finfo(out_dtype).max

    def assert_quantised(y: Tensor, off: Tensor | float = 0.0) -> None:
        assert_rounded(out, (y / scale.double()).clamp(-most, most), off / scale.double())
        out.zero_()

    flashinfer.rmsnorm_quant(out=out, input=x, weight=weight, scale=scale, eps=1e-6, enable_pdl=None)
    assert_quantised(rms(x, weight))
    kept = x.clone()
    flashinfer.fused_add_rmsnorm_quant(out=out, input=x, residual=residual, weight=weight, scale=scale)
    assert_quantised(rms(total, weight))
    assert torch.equal(residual, total.to(torch.bfloat16))
    assert torch.equal(x, kept)
    flashinfer.layernorm_quant(out=out, input=x, gemma=weight, beta=beta, scale=scale, eps=0.5)
    y = F.layer_norm(x.double(), (N,), weight.double(), beta.double(), 0.5)
    # rounded to bf16 first, by half an ulp of its own; 6 as for layernorm
    assert_quantised(y, off=2.0**-8 * y.abs() / (16 * 2.0**-24) + 6 * float(weight.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out_dtype", FP8)
def test_layernorm_quant_rounds_to_the_dtype_of_the_input_first(out_dtype: torch.dtype, dtype: torch.dtype) -> None:
    """Its RMSNorms are not rounded first. Half of a row is 2 and half is -2, so with eps 0 the norm is exact: gamma +
    beta or beta - gamma, in fp32."""
    sign = draw(M, N, seed=0, dtype=torch.float32).argsort(-1).remainder(2) * 2.0 - 1.0
    gamma, beta = (draw(N, seed=seed, dtype=torch.float32) for seed in (1, 2))  # its parameters are fp32
    scale, most = torch.tensor(0.003), torch.finfo(out_dtype).max  # so small that some of e4m3 saturate
    out, unrounded = torch.empty(M, N, dtype=out_dtype), torch.empty(M, N, dtype=out_dtype)
    x, y = (2 * sign).to(dtype), (sign * gamma + beta).to(dtype).float()
    flashinfer.layernorm_quant(out=out, input=x, gemma=gamma, beta=beta, scale=scale, eps=0.0)
    assert torch.equal(out.float(), (y * scale.reciprocal()).clamp(-most, most).to(out_dtype).float())
    norm_plugin.layernorm_quant(unrounded, x, gamma, beta, scale, 0.0)
    assert not torch.equal(out.float(), unrounded.float())


def test_a_scale_may_be_a_number() -> None:
    x, weight = draw(M, N, seed=0, dtype=torch.bfloat16), draw(N, seed=1, dtype=torch.bfloat16)
    outs = [torch.empty(M, N, dtype=torch.float8_e4m3fn) for _ in range(2)]
    for out, scale in zip(outs, (0.25, torch.tensor([0.25])), strict=True):
        flashinfer.rmsnorm_quant(out, x, weight, scale)
    assert torch.equal(*(out.float() for out in outs))


def test_gradients_pass_through() -> None:
    """FlashInfer has no gradients. Ours are those of torch's own LayerNorm and RMSNorm."""
    x = draw(M, N, seed=0, dtype=torch.float32).requires_grad_()
    gemma, beta = (draw(N, seed=seed, dtype=torch.float32).requires_grad_() for seed in (1, 2))
    for ours, theirs in (
        (flashinfer.layernorm(x, gemma, beta), F.layer_norm(x, (N,), gemma, beta, 1e-6)),
        (flashinfer.rmsnorm(x, gemma), F.rms_norm(x, (N,), gemma, 1e-6)),
    ):
        wanted = (x, gemma, beta) if theirs.grad_fn.name().startswith("NativeLayerNorm") else (x, gemma)
        cotangent = draw(M, N, seed=3, dtype=torch.float32)
        grads = [torch.autograd.grad(y, wanted, cotangent) for y in (ours, theirs)]
        for mine, other in zip(*grads, strict=True):
            # both are sums of up to N terms: a rounding a term, of the largest
            assert (mine - other).abs().max() <= 2 * N * 2.0**-24 * other.abs().max()
