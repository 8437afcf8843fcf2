"""triton-transformer's layernorm: torch's without a shift, and the stable form at the ends of its domain."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from norm_plugin import dispatch, settings
from norm_plugin.accuracy import bounds, ulps
from norm_plugin.compat.triton_transformer import layernorm

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
M, N = 4, 200
EPS = 1e-5


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def below(top: float, *, magnitude: float = 1.0) -> Tensor:
    """Rows whose maximum is `top`, and whose other elements are negative and of some magnitude."""
    x = -magnitude * (draw(M, N).abs() + 0.1)
    x[:, 7] = top
    return x


def test_signature() -> None:
    assert str(inspect.signature(layernorm)).startswith(
        "(x: 'Tensor', gamma: 'Tensor', eps: 'float' = 1e-05, use_triton: 'bool' = False, stable: 'bool' = False)"
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("use_triton", [False, True])
def test_is_torchs(use_triton: bool, dtype: torch.dtype) -> None:
    x, gamma = draw(3, M, N).to(dtype), draw(N, seed=1).to(dtype)
    truth = F.layer_norm(x.double(), (N,), gamma.double(), torch.zeros(N).double(), EPS)
    y = layernorm(x, gamma, use_triton=use_triton)
    assert y.dtype == dtype
    assert ulps.excess(y, bounds.layernorm(x, gamma, None, EPS), truth) == 0
    if dtype == torch.float32:
        theirs = F.layer_norm(x, (N,), gamma, torch.zeros_like(gamma), EPS)
        torch.testing.assert_close(y, theirs, rtol=0, atol=1e-6)


#: Rows with a positive maximum, for which the stable form equals the plain formula.
POSITIVE = {
    "normal": draw(M, N),
    "far from zero": draw(M, N) + 100,
    "huge": draw(M, N) * 1e30,
    "the largest": draw(M, N).clamp(-1, 1) * torch.finfo(torch.float32).max,
    "tiny": draw(M, N) * 1e-36,
    "a constant": torch.full((M, N), 5.0),
    **{f"maximum {top:g}": below(top) for top in (1e-3, 1e-6, 1e-11, 1e-12, 1e-13, 1e-20, 1e-38, 1e-45)},
    "maximum 1e-38 of 1e30": below(1e-38, magnitude=1e30),
}


@pytest.mark.parametrize("eps", [EPS, 1.0])
@pytest.mark.parametrize("use_triton", [False, True])
@pytest.mark.parametrize("name", POSITIVE)
def test_stable_is_the_plain_formula_where_the_maximum_is_positive(name: str, use_triton: bool, eps: float) -> None:
    x, gamma = POSITIVE[name], draw(N, seed=1)
    ratio = x.double() / x.double().amax(-1, keepdim=True)
    truth = F.layer_norm(ratio, (N,), gamma.double(), None, eps)
    y = layernorm(x, gamma, eps, use_triton=use_triton, stable=True)
    # the bound of a LayerNorm of the ratios, whose rounding to fp32 moves the row by its magnitude over its spread
    spread = (ratio.var(-1, keepdim=True, correction=0) + eps).sqrt()
    rounding = 2 * 2.0**-24 * ratio.abs().amax(-1, keepdim=True) / spread * gamma.double().abs()
    terms = 1 + (ratio - ratio.mean(-1, keepdim=True)).abs() / spread
    assert ulps.excess(y, rounding * terms + 16 * 2.0**-24 * terms * gamma.double().abs(), truth) == 0


#: Rows without a positive maximum, and the divisor that they get instead.
OTHERS = {
    "all negative": (draw(M, N) - 10, "magnitude of the maximum"),
    "a negative constant": (torch.full((M, N), -5.0), "magnitude of the maximum"),
    "negative and huge": (below(-1e25, magnitude=1e30), "magnitude of the maximum"),
    "maximum 0": (below(0.0), "none"),
    "maximum 0, huge": (below(0.0, magnitude=1e30), "none"),
    "maximum -1e-30": (below(-1e-30), "none"),
    "zeros": (torch.zeros(M, N), "none"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_stable_elsewhere(name: str) -> None:
    """A negative maximum divides by its magnitude; with a tiny one eps has no effect; zeros stay zeros."""
    x, divisor = OTHERS[name]
    gamma, h = draw(N, seed=1), x.double()
    if divisor == "none":
        magnitude = h.abs().amax(-1, keepdim=True)
        truth = F.layer_norm(h / magnitude.where(magnitude > 0, 1.0), (N,), gamma.double(), None, 1e-30)
    else:
        truth = F.layer_norm(h / h.amax(-1, keepdim=True).abs(), (N,), gamma.double(), None, EPS)
    y = layernorm(x, gamma, stable=True)
    assert y.isfinite().all()
    # rows of spread 0.1 of their magnitude or more: the ratios' rounding counts at most tenfold, besides 16 others
    assert ((y - truth).abs() <= 32 * 2.0**-24 * (1 + truth.abs()) * 10).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_stable_keeps_the_dtype(dtype: torch.dtype) -> None:
    x, gamma = draw(M, N).to(dtype), draw(N, seed=1).to(dtype)
    ratio = x.double() / x.double().amax(-1, keepdim=True)
    y = layernorm(x, gamma, stable=True)
    assert y.dtype == dtype
    truth = F.layer_norm(ratio, (N,), gamma.double(), None, EPS)
    # ratios of at most ten: their rounding costs as many digits of a standardized row
    assert ulps.excess(y, 10 * bounds.layernorm(ratio.float(), gamma, None, EPS), truth) == 0


@pytest.mark.parametrize("stable", [False, True])
@pytest.mark.parametrize("use_triton", [False, True])
def test_gradients(use_triton: bool, stable: bool) -> None:
    def differentiate(x: Tensor, gamma: Tensor, plain: bool) -> list[Tensor]:
        x, gamma = x.clone().requires_grad_(), gamma.clone().requires_grad_()
        if plain:
            h = x / x.amax(-1, keepdim=True) if stable else x
            y = F.layer_norm(h, (N,), gamma, None, EPS)
        else:
            y = layernorm(x, gamma, EPS, use_triton, stable)
        y.backward(draw(M, N, seed=2).to(y.dtype))
        return [x.grad, gamma.grad]

    x, gamma = draw(M, N), draw(N, seed=1)
    exact = differentiate(x.double(), gamma.double(), plain=True)
    for ours, truth in zip(differentiate(x, gamma, plain=False), exact, strict=True):
        # sums of N terms: a rounding a term, of the largest
        assert (ours - truth).abs().max() <= N * 2.0**-24 * truth.abs().max()


@pytest.mark.parametrize("name", [*OTHERS, "maximum 1e-20", "huge"])
def test_stable_gradients_are_finite(name: str) -> None:
    x = (POSITIVE[name] if name in POSITIVE else OTHERS[name][0]).clone().requires_grad_()
    layernorm(x, torch.ones(N), stable=True).pow(3).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("stable", [False, True])
@pytest.mark.parametrize("use_triton", [False, True])
@pytest.mark.parametrize(
    ("x", "gamma", "error", "message"),
    [
        (torch.ones(M, N, dtype=torch.int32), torch.ones(N), TypeError, "x has dtype int32; it must be float16, "),
        (torch.ones(M, N, dtype=torch.bool), torch.ones(N), TypeError, r"x has dtype bool; .*\. Cast it\."),
        (torch.ones(M, N), torch.ones(N, dtype=torch.int64), TypeError, "gamma has dtype int64; .* Cast it"),
        (torch.ones(M, N), torch.ones(1), ValueError, rf"gamma has shape \[1\]; it must be \[{N}\]"),
        (torch.ones(M, N), torch.tensor(2.0), ValueError, rf"gamma has shape \[\]; it must be \[{N}\]"),
        (torch.ones(M, N), torch.ones(M, N), ValueError, rf"gamma has shape \[{M}, {N}\]; it must be \[{N}\]"),
        (torch.ones(M, 1), torch.ones(N), ValueError, r"gamma has shape .* it must be \[1\], the last dimension of x"),
        (torch.tensor(1.0), torch.ones(1), ValueError, r"x has shape \[\]; it must have a last dimension"),
        (torch.ones(M, 0), torch.ones(0), ValueError, rf"x has shape \[{M}, 0\]; it must have a last dimension"),
        (torch.ones(M, N), torch.ones(N, device="meta"), ValueError, "gamma is on meta and x on cpu; move gamma to"),
        (torch.ones(M, N), None, TypeError, "gamma is None"),
        ([1.0, 2.0], torch.ones(2), TypeError, "x is of type list; it must be a tensor"),
    ],
)
def test_what_is_refused(
    x: Tensor, gamma: Tensor, error: type[Exception], message: str, use_triton: bool, stable: bool
) -> None:
    with pytest.raises(error, match=message):
        layernorm(x, gamma, use_triton=use_triton, stable=stable)


@pytest.mark.parametrize("use_triton", [False, True])
@pytest.mark.parametrize("eps", [float("nan"), -1.0, float("inf")])
def test_an_eps_that_is_refused(eps: float, use_triton: bool) -> None:
    with pytest.raises(ValueError, match=r"eps is .*; it must be a finite number of at least 0"):
        layernorm(torch.ones(M, N), torch.ones(N), eps, use_triton)


@pytest.mark.parametrize("stable", [False, True])
def test_what_ran_is_counted_where_triton_was_asked_for(stable: bool) -> None:
    x, gamma = draw(M, N), torch.ones(N)
    with settings.override(backend="triton", strict=False):
        dispatch.reset()
        layernorm(x, gamma, stable=stable)
        assert dispatch.calls("layernorm") == 0
        layernorm(x, gamma, use_triton=True, stable=stable)
        (route,) = dispatch.routes()
        assert route.op.name == "layernorm"
        assert route.backend == "triton" or (route.fallback and "CPU" in route.reason)
