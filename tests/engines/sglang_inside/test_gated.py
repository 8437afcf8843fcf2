"""SGLang's own gated kernels, in Triton's interpreter, against our native op and our kernel."""

import importlib

import pytest
import torch
from sglang.kernels.ops.attention.fla import fused_norm_gate, layernorm_gated

from norm_plugin import settings
from norm_plugin.accuracy.ulps import size
from norm_plugin.dispatch import BackendError
from norm_plugin.engines import call_counts, sglang_gated
from tests.engines.sglang_inside.samples import DTYPES, tensor

STOCK = layernorm_gated.rms_norm_gated
STOCK_GATE = fused_norm_gate.rms_norm_gated
BACKENDS = ("native", "triton")


@pytest.fixture(params=BACKENDS)
def backend(request, hooks):
    """Taken, on native and on Triton."""
    sglang_gated.hook_layernorm_gated(layernorm_gated, hooks)
    sglang_gated.hook_fused_norm_gate(fused_norm_gate, hooks)
    with settings.override(backend=request.param, strict=True):
        yield request.param


def close(ours, theirs):
    """Both round once from fp32, in which their sums, roots and exponentials are a few roundings apart: that can make
    the next number, or in a LayerNorm, where the mean is taken off, as much as a rounding of the row's largest."""
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    steps = 16 if ours.dtype == torch.float32 else 1
    largest = theirs.double().abs().amax(-1, keepdim=True)
    allowed = steps * size(theirs.double(), ours.dtype) + largest * 2.0**-21
    assert ((ours.double() - theirs.double()).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_rms_norm", [True, False])
@pytest.mark.parametrize("norm_before_gate", [True, False])
@pytest.mark.parametrize("group_size", [None, 32])
def test_layernorm_gated(backend, group_size, norm_before_gate, is_rms_norm, dtype):
    x, z, w = (tensor(*shape, dtype=dtype, outlier=False) for shape in ((7, 96), (7, 96), (96,)))
    bias = None if is_rms_norm else tensor(96, dtype=dtype, outlier=False)
    how = {"group_size": group_size, "norm_before_gate": norm_before_gate, "is_rms_norm": is_rms_norm, "eps": 1e-5}
    before = x.clone()
    ours = layernorm_gated.rms_norm_gated(x=x, weight=w, bias=bias, z=z, **how)
    assert torch.equal(x, before)
    close(ours, STOCK(x=x, weight=w, bias=bias, z=z, **how))
    assert call_counts.calls("gated_norm") == 1


@pytest.mark.parametrize("activation", ["swish", "silu", "sigmoid"])
def test_its_modules(backend, activation):
    norm = layernorm_gated.RMSNorm(96, eps=1e-5, dtype=torch.float32, activation=activation).requires_grad_(False)
    norm.weight.copy_(tensor(96, dtype=torch.float32))
    x, z = tensor(7, 96, dtype=torch.float32), tensor(7, 96, dtype=torch.float32)
    close(norm(x, z), STOCK(x=x, weight=norm.weight, bias=None, z=z, eps=1e-5, is_rms_norm=True, activation=activation))
    assert norm(x).shape == x.shape  # without a gate
    assert call_counts.calls("gated_norm") == 2


def test_gates_by_head(backend):
    """Since 0.5.20: x of [tokens * heads, N] beside a view of z of [tokens, heads, N]."""
    wide = tensor(5, 4, 3 * 32, dtype=torch.float32)
    x, w, z = tensor(20, 32, dtype=torch.float32), tensor(32, dtype=torch.float32), wide[..., 32:64]
    how = {"weight": w, "bias": None, "eps": 1e-6, "is_rms_norm": True}
    close(layernorm_gated.rms_norm_gated(x=x, z=z, **how), STOCK(x=x, z=z, **how))


def test_slices_of_a_projection(backend):
    wide = tensor(7, 3 * 96, dtype=torch.float32)
    x, z, w = wide[:, :96], wide[:, 96:192], tensor(96, dtype=torch.float32)
    how = {"weight": w, "bias": None, "eps": 1e-6, "is_rms_norm": True, "norm_before_gate": False}
    close(layernorm_gated.rms_norm_gated(x=x, z=z, **how), STOCK(x=x, z=z, **how))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["swish", "sigmoid"])
@pytest.mark.parametrize("shape", [(37, 32), (1, 5, 4, 32), (3, 640)])
def test_fused_norm_gate(backend, shape, activation, dtype):
    norm = fused_norm_gate.FusedRMSNormGated(shape[-1], eps=1e-6, activation=activation, dtype=dtype)
    norm.requires_grad_(False).weight.copy_(tensor(shape[-1], dtype=dtype, outlier=False))
    x, g = tensor(*shape, dtype=dtype, outlier=False), tensor(*shape, dtype=dtype, outlier=False)
    before = x.clone()
    ours = norm(x, g)
    assert torch.equal(x, before)
    close(ours, STOCK_GATE(x.clone(), g, norm.weight, None, activation, eps=1e-6))
    assert call_counts.calls("gated_norm") == 1


def test_a_gate_of_other_dimensions(backend):
    """Kimi: x of [1, tokens, heads, N], g of [tokens, heads, N]."""
    x, g = tensor(1, 5, 4, 32, dtype=torch.float32), tensor(5, 4, 32, dtype=torch.float32)
    w = tensor(32, dtype=torch.float32)
    ours = fused_norm_gate.rms_norm_gated(x, g, w, None, "sigmoid")
    close(ours, STOCK_GATE(x.clone(), g, w, None, "sigmoid"))


def test_a_mistake_is_seen(backend):
    """What `close` lets pass is less than the gate on the wrong side, or another eps, would cost."""
    x, z, w = (tensor(*shape, dtype=torch.float32, outlier=False) for shape in ((7, 96), (7, 96), (96,)))
    how = {"x": x, "weight": w, "bias": None, "z": z, "is_rms_norm": True}
    for mistake in ({"norm_before_gate": False}, {"eps": 1e-5}, {"group_size": 32}, {"activation": "sigmoid"}):
        with pytest.raises(AssertionError):
            close(layernorm_gated.rms_norm_gated(**how), STOCK(**how, **mistake))


def test_what_is_left_to_sglang(hooks):
    sglang_gated.hook_layernorm_gated(layernorm_gated, hooks)
    sglang_gated.hook_fused_norm_gate(fused_norm_gate, hooks)
    x, w = tensor(7, 96, dtype=torch.float32), tensor(96, dtype=torch.float32)
    how = {"x": x, "weight": w, "bias": None, "z": x, "is_rms_norm": True, "activation": "none"}
    assert torch.equal(layernorm_gated.rms_norm_gated(**how), STOCK(**how))  # SGLang takes that for no gate at all
    assert call_counts.calls("gated_norm", "an activation 'none'") == 1
    ours = fused_norm_gate.rms_norm_gated(x.clone(), x, w, None, residual=x, prenorm=True)
    assert all(map(torch.equal, ours, STOCK_GATE(x.clone(), x, w, None, residual=x, prenorm=True)))
    assert call_counts.calls("gated_norm", "a residual in a gated norm") == 1
    with settings.override(strict=True), pytest.raises(BackendError, match="activation 'none'"):
        layernorm_gated.rms_norm_gated(**how)


def test_who_imported_the_function_by_name_has_ours_too(hooks):
    mixer2 = importlib.import_module("sglang.srt.layers.attention.mamba.mixer2_rms_norm_gated")
    assert mixer2.rms_norm_gated is STOCK
    sglang_gated.hook_layernorm_gated(layernorm_gated, hooks)
    assert mixer2.rms_norm_gated is layernorm_gated.rms_norm_gated is not STOCK
    hooks.undo()
    assert mixer2.rms_norm_gated is layernorm_gated.rms_norm_gated is STOCK
