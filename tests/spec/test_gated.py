"""The gated norms against the oracle, their statistics, and the formulas that they replace.

The grid: dtype of x and z and of weight and bias x gate before or after the norm x LayerNorm or RMSNorm x groups x
activation x bias and z given or not x numerics x every class of input. Tolerances: half an ulp of the output plus
norm_plugin.accuracy.bounds, which derives them from the formula.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import norm_plugin
from norm_plugin.accuracy import bounds, inputs, oracle, ulps
from norm_plugin.native import _layer_norm_fwd_native, layernorm_fn_native, rmsnorm_fn_native
from norm_plugin.numerics import ACTIVATIONS, GATED_NUMERICS
from norm_plugin.ops import OPS
from tests.spec import judge, samples
from tests.spec.backend import Backend

OP = OPS["gated_norm"]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
GIVEN = [{}, {"bias": None}, {"weight": None, "bias": None}, {"z": None}]
EPS = 1e-6
ROWS = 256


@pytest.mark.parametrize("given", GIVEN, ids=str)
@pytest.mark.parametrize("numerics", GATED_NUMERICS)
@pytest.mark.parametrize("is_rms_norm", [True, False], ids=["rms", "layer"])
@pytest.mark.parametrize("before", [True, False], ids=["norm_first", "gate_first"])
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gated_norm(
    backend: Backend,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    before: bool,
    is_rms_norm: bool,
    numerics: str,
    given: samples.Arguments,
) -> None:
    """Group size and activation change with the class of input, so that each meets the others."""
    ways = product((None, 32, 96), ACTIVATIONS)
    for name, (group_size, activation) in zip(inputs.CLASSES, [*ways, (32, "silu")], strict=True):
        a = backend.arguments(
            OP,
            (6, 192),
            dtype,
            weight_dtype=weight_dtype,
            input_class=name,
            norm_before_gate=before,
            is_rms_norm=is_rms_norm,
            numerics=numerics,
            group_size=group_size,
            activation=activation,
            **given,
        )
        judge.check(OP, a, backend.outputs(OP, a))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gates_far_out(backend: Backend, dtype: torch.dtype, activation: str) -> None:
    """Gates of +-200 and +-65504: exp overflows in fp32, the gate does not."""
    z = torch.tensor([200.0, -200.0, 65504.0, -65504.0]).repeat(16).to(dtype).expand(6, 64).contiguous()
    for before in (True, False):
        a = backend.arguments(OP, (6, 64), dtype, z=z, norm_before_gate=before, activation=activation)
        judge.check(OP, a, backend.outputs(OP, a))


def test_swish_is_silu(backend: Backend) -> None:
    a = backend.arguments(OP, (6, 64))
    silu, swish = (backend.outputs(OP, a | {"activation": name})[0] for name in ("silu", "swish"))
    assert torch.equal(silu, swish)


def test_z_may_have_its_own_dtype(backend: Backend) -> None:
    for dtype, z_dtype in product(DTYPES, DTYPES):
        a = backend.arguments(OP, (6, 64), dtype, z=backend.make("normal", (6, 64), z_dtype, 3))
        judge.check(OP, a, backend.outputs(OP, a))


def test_the_names_of_the_field_are_one_op() -> None:
    a = samples.arguments(OP, (6, 64), group_size=16)
    positional = [a[name] for name in ("x", "weight", "bias", "z", "eps", "group_size", "norm_before_gate")]
    for is_rms_norm, functions in (
        (False, (norm_plugin.layernorm_fn, layernorm_fn_native)),
        (True, (norm_plugin.rmsnorm_fn, rmsnorm_fn_native)),
    ):
        expected = samples.outputs(OP, a | {"is_rms_norm": is_rms_norm})[0]
        for function in functions:
            assert torch.equal(function(*positional), expected)


# --- statistics ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group_size", [None, 16, 64])
@pytest.mark.parametrize("before", [True, False], ids=["norm_first", "gate_first"])
@pytest.mark.parametrize("is_rms_norm", [True, False], ids=["rms", "layer"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_with_statistics(dtype: torch.dtype, is_rms_norm: bool, before: bool, group_size: int | None) -> None:
    """fp32 of length ngroups * M, group-major, as the Triton kernels of mamba_ssm and FLA lay them out.

    The error of a mean is a share of the mean magnitude, by the roundings of its sum. The error of rstd is a share of
    itself, in which the size of the gated row counts, because that is rounded before it is centred.
    """
    x, z = inputs.make("row_scales", (5, 64), dtype, 1), inputs.make("normal", (5, 64), dtype, 2)
    weight, bias = inputs.weights(64, dtype), inputs.biases(64, dtype)
    how = (group_size, before, is_rms_norm, "silu")
    out, mean, rstd = _layer_norm_fwd_native(
        x, weight, bias, EPS, z, group_size=group_size, norm_before_gate=before, is_rms_norm=is_rms_norm
    )
    assert torch.equal(out, layernorm_fn_native(x, weight, bias, z, EPS, *how))

    _, true_mean, true_rstd = oracle.normalized_groups(x, z, EPS, *how)
    true_rstd = true_rstd.t().flatten()
    h = (x.double() if before else x.double() * oracle.gate(z, "silu")).unflatten(-1, (-1, group_size or 64))
    share = bounds.ROUNDINGS * bounds.rounding(dtype)
    group_major = h.transpose(0, 1).reshape(-1, h.shape[-1])
    size = group_major.square().mean(-1).sqrt()
    assert rstd.dtype == torch.float32
    assert ulps.excess(rstd, share * true_rstd * (1 + 2 * size * true_rstd), true_rstd) == 0
    if is_rms_norm:
        assert mean is None
        assert true_mean is None
    else:
        assert mean is not None
        assert true_mean is not None
        assert mean.dtype == torch.float32
        assert ulps.excess(mean, share * group_major.abs().mean(-1), true_mean.t().flatten()) == 0


def test_forward_writes_its_out() -> None:
    a = samples.arguments(OP, (5, 64))
    out = torch.empty_like(a["x"])
    returned, _, _ = _layer_norm_fwd_native(a["x"], a["weight"], a["bias"], EPS, a["z"], out)
    assert returned is out
    assert torch.equal(out, layernorm_fn_native(a["x"], a["weight"], a["bias"], a["z"]))


# --- against what is replaced -------------------------------------------------------------------------------------


def reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor, group_size: int, before: bool, rms: bool
) -> Tensor:
    """The reference of mamba_ssm (rms_norm_ref, or torch's layer_norm), upcast as mamba_ssm calls it."""
    x, z, weight = x.float(), z.float(), weight.float()
    bias = None if bias is None else bias.float()
    if not before:
        x = x * F.silu(z)
    groups = x.unflatten(-1, (-1, group_size))
    if rms:
        normed = groups * (1 / torch.sqrt(groups.square().mean(-1, keepdim=True) + EPS))
    else:
        normed = F.layer_norm(groups, (group_size,), None, None, EPS)
    out = normed.flatten(-2) * weight
    out = out if bias is None else out + bias
    return out * F.silu(z) if before else out


@pytest.mark.parametrize("is_rms_norm", [True, False], ids=["rms", "layer"])
@pytest.mark.parametrize("before", [True, False], ids=["norm_first", "gate_first"])
@pytest.mark.parametrize("name", ["normal", "outliers", "row_scales", "large_mean"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_worse_than_the_reference_of_mamba(dtype: torch.dtype, name: str, before: bool, is_rms_norm: bool) -> None:
    x, z = inputs.make(name, (ROWS, 256), dtype, 1), inputs.make("normal", (ROWS, 256), dtype, 2)
    weight, bias = inputs.weights(256, dtype), None if is_rms_norm else inputs.biases(256, dtype)
    theirs = reference(x, weight, bias, z, 128, before, is_rms_norm).to(dtype)
    a = (x, weight, bias, z, EPS, 128, before, is_rms_norm)
    judge.no_worse(norm_plugin.layernorm_fn(*a), theirs, oracle.gated_norm(*a))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_zeros_without_eps_are_nan_as_in_torch(backend: Backend, dtype: torch.dtype) -> None:
    x, z = backend.make("zeros", (6, 96), dtype), backend.make("normal", (6, 96), dtype, 2)
    theirs = F.rms_norm(x, (96,), None, 0.0).isnan()
    assert theirs.any()
    assert not theirs.all()
    for is_rms_norm, before in product((True, False), (True, False)):
        ours = norm_plugin.layernorm_fn(x, None, None, z, 0.0, None, before, is_rms_norm)
        assert torch.equal(ours.isnan(), theirs)


def test_an_unknown_activation_is_refused_by_the_native_functions_too() -> None:
    """No dispatch checks them. An unknown activation that ran as SiLU would be a silent wrong answer."""
    x = torch.randn(2, 8)
    with pytest.raises(ValueError, match=r"activation is 'gelu'; it must be one of silu, swish, sigmoid\."):
        rmsnorm_fn_native(x, None, None, z=x, activation="gelu")
