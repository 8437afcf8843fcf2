"""mamba_ssm's names: its signatures, its classes, the layout of its statistics, and its criterion of correctness.

The criterion: our error is at most twice that of the same formula in PyTorch, computed in the dtype of the inputs,
forward and backward. One rounding of the largest value is added, because a formula may hit a value by chance. The grid
is that of Mamba2 and of the linear attention models: rows of 2048 and 4096 in groups of 64 or in one, with the gate on
either side or without one.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from norm_plugin.accuracy import ulps
from norm_plugin.compat import mamba_ssm

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
GATED = "z=None, eps={eps}, group_size=None, norm_before_gate=True"
SIGNATURES = {
    "layernorm_fn": f"x, weight, bias, {GATED.format(eps='1e-06')}, is_rms_norm=False, activation=silu",
    "rmsnorm_fn": f"x, weight, bias, {GATED.format(eps='1e-06')}, activation=silu",
    "rms_norm_ref": f"x, weight, bias, {GATED.format(eps='1e-06')}, upcast=True",
    "_layer_norm_fwd": "x, weight, bias, eps, z=None, out=None, group_size=None, norm_before_gate=True, "
    "is_rms_norm=False, activation=swish",
    "RMSNorm": "hidden_size, eps=1e-05, group_size=None, norm_before_gate=True, device=None, dtype=None, "
    "activation=swish",
    "LayerNorm": "hidden_size, eps=1e-05, group_size=None, norm_before_gate=True, device=None, dtype=None, "
    "activation=swish",
}
EPS = 1e-5


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def formula(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None,
    group_size: int | None,
    norm_before_gate: bool,
    is_rms_norm: bool,
) -> Tensor:
    """The norm as in a paper, in the dtype of its arguments."""
    h = x if z is None or norm_before_gate else x * F.silu(z)
    h = h.unflatten(-1, (-1, group_size or x.shape[-1]))
    h = h if is_rms_norm else h - h.mean(-1, keepdim=True)
    y = (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + EPS)).flatten(-2) * weight
    y = y if bias is None else y + bias
    return y * F.silu(z) if z is not None and norm_before_gate else y


def with_gradients(
    function: Callable[..., Tensor], tensors: list[Tensor | None], cotangent: Tensor, *how: object
) -> list[Tensor]:
    leaves = [t if t is None else t.detach().clone().requires_grad_() for t in tensors]
    out = function(*leaves, *how)
    given = [t for t in leaves if t is not None]
    return [out.detach(), *torch.autograd.grad(out, given, cotangent.to(out.dtype))]


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name: str) -> None:
    parameters = inspect.signature(getattr(mamba_ssm, name)).parameters.values()
    taken = [p for p in parameters if p.kind is not p.KEYWORD_ONLY]
    written = [p.name if p.default is p.empty else f"{p.name}={p.default}" for p in taken]
    assert ", ".join(written) == SIGNATURES[name]


def test_every_name_is_public() -> None:
    assert sorted(mamba_ssm.__all__) == sorted(SIGNATURES)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("gate", ["after the norm", "before the norm", "none"])
@pytest.mark.parametrize("is_rms_norm", [True, False])
@pytest.mark.parametrize("group_size", [64, None])
@pytest.mark.parametrize("width", [2048, 4096])
def test_error_is_at_most_twice_that_of_pytorch(
    width: int, group_size: int | None, is_rms_norm: bool, gate: str, with_bias: bool, dtype: torch.dtype
) -> None:
    x, z, cotangent = (draw(2, 9, width, seed=seed, dtype=dtype) for seed in range(3))
    weight, bias = (draw(width, seed=seed, dtype=dtype) for seed in (3, 4))
    tensors = [x, weight, bias if with_bias else None, None if gate == "none" else z]
    norm_before_gate = gate != "before the norm"
    how = (group_size, norm_before_gate, is_rms_norm)
    ours = with_gradients(mamba_ssm.layernorm_fn, tensors, cotangent, EPS, *how)
    pytorchs = with_gradients(formula, tensors, cotangent, *how)
    exact = with_gradients(formula, [t if t is None else t.double() for t in tensors], cotangent, *how)
    if is_rms_norm:
        assert torch.equal(mamba_ssm.rmsnorm_fn(*tensors, EPS, group_size, norm_before_gate), ours[0])
    for mine, other, truth in zip(ours, pytorchs, exact, strict=True):
        assert mine.dtype == dtype
        error, allowed = (mine - truth).abs().max(), 2 * (other - truth).abs().max()
        slack = torch.finfo(dtype).eps / 2 * truth.abs().max()
        assert error <= allowed + slack, f"{error:.3g}, and twice PyTorch's own is {allowed:.3g}"


@pytest.mark.parametrize("gate", [None, True, False])
@pytest.mark.parametrize("group_size", [None, 16])
def test_reference(group_size: int | None, gate: bool | None) -> None:
    x, z = (draw(5, 64, seed=seed, dtype=torch.bfloat16) for seed in range(2))
    weight, bias = (draw(64, seed=seed, dtype=torch.bfloat16) for seed in (2, 3))
    z, norm_before_gate = (None, True) if gate is None else (z, gate)
    arguments = (x, weight, bias, z, EPS, group_size, norm_before_gate)
    wide = [t if t is None else t.double() for t in (x, weight, bias, z)]
    truth = formula(*wide, group_size, norm_before_gate, True)
    offset = wide[2] * F.silu(wide[3]) if z is not None and norm_before_gate else wide[2]
    terms = (truth - offset).abs() + offset.abs()
    # fp32 and one rounding; 16 roundings are more than the formula has
    assert ulps.excess(mamba_ssm.rms_norm_ref(*arguments), 16 * 2.0**-24 * terms, truth) == 0
    rounded = mamba_ssm.rms_norm_ref(*arguments, upcast=False)
    assert rounded.dtype == x.dtype
    assert ulps.excess(rounded, 16 * 2.0**-8 * terms, truth) == 0
    assert not torch.equal(rounded, mamba_ssm.rms_norm_ref(*arguments))


@pytest.mark.parametrize("is_rms_norm", [True, False])
@pytest.mark.parametrize("groups", [1, 4])
def test_statistics_are_group_major(groups: int, is_rms_norm: bool) -> None:
    rows, width = 5, 64
    x, weight = draw(rows, width, seed=0) + 2, draw(width, seed=1)
    out = torch.empty_like(x)
    y, mean, rstd = mamba_ssm._layer_norm_fwd(
        x, weight, None, EPS, out=out, group_size=width // groups, is_rms_norm=is_rms_norm
    )
    assert y is out
    assert torch.equal(y, mamba_ssm.layernorm_fn(x, weight, None, None, EPS, width // groups, True, is_rms_norm))
    assert rstd.shape == (groups * rows,)
    assert rstd.dtype == torch.float32
    by_group = x.double().unflatten(-1, (groups, -1))
    means = by_group.mean(-1)
    squares = by_group.square().mean(-1) - (0 if is_rms_norm else means.square())
    for group in range(groups):
        of_group = slice(group * rows, (group + 1) * rows)
        # sums of at most 64 values near 2 in fp32: below 64 roundings of each statistic
        torch.testing.assert_close(rstd[of_group].double(), (squares[:, group] + EPS).rsqrt(), rtol=2.0**-18, atol=0)
        if mean is not None:
            torch.testing.assert_close(mean[of_group].double(), means[:, group], rtol=2.0**-18, atol=0)
    assert (mean is None) == is_rms_norm


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
def test_classes_are_the_functions(kind: str, dtype: torch.dtype) -> None:
    layer = getattr(mamba_ssm, kind)(64, 1e-3, 16, False, "cpu", dtype)
    assert list(layer.state_dict()) == (["weight"] if kind == "RMSNorm" else ["weight", "bias"])
    assert kind == "LayerNorm" or layer.bias is None
    x, z = (draw(3, 5, 64, seed=seed, dtype=dtype) for seed in range(2))
    how = (1e-3, 16, False, kind == "RMSNorm")
    assert torch.equal(layer(x, z), mamba_ssm.layernorm_fn(x, layer.weight, layer.bias, z, *how))
    assert torch.equal(layer(x), mamba_ssm.layernorm_fn(x, layer.weight, layer.bias, None, *how))
    layer(x, z).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


X = torch.ones(2, 8)
W = torch.ones(8)


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (lambda: mamba_ssm.rmsnorm_fn(X, W, None, X, activation="gelu"), "activation is 'gelu'"),
        (lambda: mamba_ssm._layer_norm_fwd(X, W, None, EPS, activation="gelu"), "activation is 'gelu'"),
        (lambda: mamba_ssm._layer_norm_fwd(X[None], W, None, EPS), "x has shape [1, 2, 8]; it must be 2-D"),
        (lambda: mamba_ssm._layer_norm_fwd(X, W, None, EPS, X[:1]), "z has shape [1, 8]"),
        (lambda: mamba_ssm._layer_norm_fwd(X, W, None, EPS, None, X[:1]), "out has shape [1, 8]"),
        (lambda: mamba_ssm._layer_norm_fwd(X, W, None, EPS, group_size=3), "group_size is 3"),
        (lambda: mamba_ssm._layer_norm_fwd(X, W[:4], None, EPS), "weight has shape [4]"),
    ],
)
def test_refusals(act: Callable[[], object], says: str) -> None:
    """Also an unknown activation, which elsewhere silently leaves out the gate."""
    with pytest.raises(ValueError, match=re.escape(says)):
        act()
