"""vLLM's own norm classes, before and after: the same bits on a CPU, for whatever their models give them."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, LayerNorm, RMSNorm, RMSNormGated
from vllm.model_executor.layers.mamba.mamba_mixer2 import Mixer2RMSNormGated
from vllm.third_party.flash_linear_attention.ops import layernorm_guard
from vllm.third_party.flash_linear_attention.ops.kda import FusedRMSNormGated

from norm_plugin import settings
from norm_plugin.accuracy import ulps
from norm_plugin.dispatch import BackendError
from norm_plugin.engines import call_counts, vllm, vllm_layers
from norm_plugin.engines.installed_hooks import installed
from norm_plugin.ops import OPS

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
WIDTH = 96


def weighted(layer, dtype=None):
    """Random parameters: a norm of ones would hide much."""
    for p in layer.parameters():
        p.data = (torch.randn_like(p, dtype=torch.float32) * 0.2 + 1).to(dtype or p.dtype)
    return layer


def both(layer, *inputs, **named):
    """What the layer answers to copies of the same inputs, stock and ours."""
    assert "vllm" not in installed
    stock = layer(*[t if t is None else t.clone() for t in inputs], **named)
    with settings.override(backend="native"):
        vllm.register()
        ours = layer(*[t if t is None else t.clone() for t in inputs], **named)
    return stock, ours


def equal(stock, ours):
    if isinstance(stock, tuple):
        return len(stock) == len(ours) and all(map(equal, stock, ours))
    return stock.dtype == ours.dtype and stock.shape == ours.shape and torch.equal(stock, ours)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight", ["like x", "fp32", None])
@pytest.mark.parametrize("with_residual", [False, True])
def test_rms_norm(dtype, weight, with_residual):
    layer = RMSNorm(WIDTH, 1e-5, has_weight=weight is not None, dtype=torch.float32)
    layer = weighted(layer, dtype if weight == "like x" else torch.float32)
    x, residual = torch.randn(2, 7, WIDTH).to(dtype)
    stock, ours = both(layer, x, residual if with_residual else None)
    assert equal(stock, ours)
    assert call_counts.calls("fused_add_rmsnorm" if with_residual else "rmsnorm") == 1


def test_rms_norm_of_heads_inside_a_wider_row():
    layer = weighted(RMSNorm(32), torch.bfloat16)
    qkv = torch.randn(5, 8 * 32).bfloat16()
    q = qkv[:, : 4 * 32].view(5, 4, 32)
    stock = layer(q)
    with settings.override(backend="native"):
        vllm.register()
        assert equal(stock, layer(q))
    assert call_counts.calls("rmsnorm") == 1


def test_the_variance_of_part_of_a_row():
    layer = weighted(RMSNorm(WIDTH, var_hidden_size=64), torch.bfloat16)
    x, residual = torch.randn(2, 7, WIDTH).bfloat16()
    assert equal(*both(layer, x))
    vllm.undo()
    assert equal(*both(layer, x, residual))
    assert call_counts.calls("rmsnorm") == call_counts.calls("add_rmsnorm") == 1


def test_no_rows(native):
    assert RMSNorm(WIDTH)(torch.empty(0, WIDTH)).shape == (0, WIDTH)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_residual", [False, True])
def test_gemma(dtype, with_residual):
    x, residual = torch.randn(2, 7, WIDTH).to(dtype)
    stock, ours = both(weighted(GemmaRMSNorm(WIDTH), dtype), x, residual if with_residual else None)
    assert equal(stock, ours)
    assert call_counts.calls("add_rmsnorm" if with_residual else "rmsnorm") == 1


def test_gemma_keeps_its_inputs(native):
    x, residual = torch.randn(2, 7, WIDTH).bfloat16()
    before = x.clone(), residual.clone()
    weighted(GemmaRMSNorm(WIDTH))(x, residual)
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parameters", ["like x", "fp32", "no bias", "none"])
def test_layer_norm(dtype, parameters):
    layer = LayerNorm(WIDTH, elementwise_affine=parameters != "none", bias=parameters != "no bias")
    layer = weighted(layer, torch.float32 if parameters == "fp32" else dtype)
    assert equal(*both(layer, torch.randn(7, WIDTH).to(dtype) + 3))
    assert call_counts.calls("layernorm") == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("activation", ["swish", "sigmoid"])
@pytest.mark.parametrize("gated", [False, True])
def test_rms_norm_gated(dtype, before, group, activation, gated):
    layer = RMSNormGated(WIDTH, group_size=group, norm_before_gate=before, activation=activation)
    x, z = torch.randn(2, 7, 3, WIDTH).to(dtype)
    assert equal(*both(weighted(layer, dtype), x, z if gated else None))
    assert call_counts.calls("gated_norm") == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [1, 3])
def test_mixer2(dtype, groups):
    layer = weighted(Mixer2RMSNormGated(WIDTH, groups), dtype)
    wider = torch.randn(7, 3 * WIDTH).to(dtype)
    x, gate = torch.randn(7, WIDTH).to(dtype), wider[:, :WIDTH]
    stock = layer(x, gate)
    with settings.override(backend="native"):
        vllm.register()
        assert equal(stock, layer(x, gate))
    assert call_counts.calls("gated_norm") == 1


@pytest.mark.parametrize(("as_eager", "numerics"), [(False, "fp32"), (True, "torch_hf")])
@pytest.mark.parametrize(("ranks", "ops"), [(1, ["gated_norm"]), (2, ["split_sums", "split_rmsnorm"])])
def test_mixer2_in_compiled_code(monkeypatch, as_eager, numerics, ranks, ops):
    """Inductor would round once, in the end; with emulate_precision_casts where eager code does."""
    monkeypatch.setattr(vllm_layers, "rounds_as_eager", as_eager)
    layer = weighted(Mixer2RMSNormGated(WIDTH, 1 if ranks == 2 else 3), torch.bfloat16)
    layer.tp_size = ranks
    x, gate = torch.randn(2, 7, WIDTH).bfloat16()
    with settings.override(backend="native", scope="all"):
        vllm.register()
        graph = make_fx(layer, tracing_mode="fake", _allow_non_fake_inputs=True)(x, gate).graph
    ours = {str(node.target).split(".")[1]: node for node in graph.nodes if "norm_plugin" in str(node.target)}
    assert list(ours) == ops
    for name, node in ours.items():
        op = OPS[name]
        assert op.complete(node.args)[op.arguments.index("numerics")] == numerics


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 7])
def test_mixer2_with_half_of_one_group(dtype, rows):
    """As on one of two ranks, whose other has zeros: vLLM's all-reduce of one process adds nothing."""
    layer = weighted(Mixer2RMSNormGated(WIDTH, 1), dtype)
    layer.tp_size = 2
    wider = torch.randn(rows, 3 * WIDTH).to(dtype)
    x, gate = torch.randn(rows, WIDTH).to(dtype), wider[:, WIDTH : 2 * WIDTH]
    stock = layer(x, gate)
    with settings.override(backend="native"):
        vllm.register()
        assert equal(stock, layer(x, gate))
    assert call_counts.calls("split_sums") == call_counts.calls("split_rmsnorm") == 1
    assert call_counts.calls("gated_norm", None) == 0


@pytest.mark.parametrize("activation", ["swish", "sigmoid"])
@pytest.mark.parametrize("affine", [False, True])
def test_kimis_gated_norm(activation, affine):
    layer = weighted(FusedRMSNormGated(WIDTH, elementwise_affine=affine, activation=activation))
    x, g = torch.randn(2, 5, 3, WIDTH).bfloat16()
    stock, ours = both(layer, x, g)  # it multiplies in another order: x * w * g * sigmoid(g)
    assert ulps.measure(ours, stock.double()).max <= 1
    assert call_counts.calls("gated_norm") == 1


@pytest.mark.parametrize("name", ["layernorm_fn", "rmsnorm_fn"])
def test_flas_functions(native, name):
    """Their Triton kernels do not run on a CPU; vLLM's RMSNormGated says in PyTorch what they compute."""
    x, weight = torch.randn(7, WIDTH).bfloat16(), torch.randn(WIDTH).bfloat16()
    z = torch.randn(7, 3 * WIDTH).bfloat16()[:, WIDTH : 2 * WIDTH]
    named = {"is_rms_norm": True} if name == "layernorm_fn" else {}
    ours = getattr(layernorm_guard, name)(x, weight, None, z=z, eps=1e-5, group_size=32, activation="swish", **named)
    stock = RMSNormGated.forward_static(x, z, weight, 1e-5, x.dtype, 32, True, "swish")
    assert ulps.measure(ours, stock.double()).max <= 1
    assert call_counts.calls("gated_norm") == 1


# --- what stays vLLM's, and why -----------------------------------------------------------------------------------

LEFT = {
    "the residual has another dtype": (
        lambda: RMSNorm(WIDTH), "fused_add_rmsnorm", (torch.ones(2, WIDTH), torch.ones(2, WIDTH).bfloat16()), {},
        "x has dtype torch.float32 and the residual torch.bfloat16",
    ),
    "the weight has another dtype": (
        lambda: weighted(RMSNorm(WIDTH), torch.float16), "rmsnorm", (torch.ones(2, WIDTH).bfloat16(),), {},
        "x has dtype torch.bfloat16 and the weight torch.float16",
    ),
    "x is in fp64": (
        lambda: GemmaRMSNorm(WIDTH), "rmsnorm", (torch.ones(2, WIDTH).double(),), {}, "x has dtype torch.float64",
    ),
    "a gate without a norm": (
        lambda: Mixer2RMSNormGated(WIDTH, 1, use_rms_norm=False), "gated_norm",
        (torch.ones(2, WIDTH), torch.ones(2, WIDTH)), {}, "use_rms_norm=False: a gate without a norm",
    ),
}  # fmt: skip


@pytest.mark.parametrize("why", LEFT)
def test_left_to_vllm_for_a_reason(why):
    make, op, inputs, named, reason = LEFT[why]
    stock, ours = both(make(), *inputs, **named)
    assert equal(stock, ours)
    assert call_counts.calls(op, reason) == 1
    assert call_counts.calls(op) == 0


@pytest.mark.parametrize("why", LEFT)
def test_strict_leaves_nothing(why):
    make, _op, inputs, named, reason = LEFT[why]
    with settings.override(backend="native", strict=True):
        vllm.register()
        with pytest.raises(BackendError, match=f"{reason}.*NORM_PLUGIN_STRICT=1"):
            make()(*inputs, **named)


def test_several_groups_that_ranks_split_are_vllms(native):
    """vLLM refuses the models that would have such a layer."""
    layer = Mixer2RMSNormGated(WIDTH, 3)
    layer.tp_size, taken = 2, []
    layer._forward_method = lambda x, gate: taken.append(True) or x
    layer(torch.ones(2, WIDTH), torch.ones(2, WIDTH))
    assert taken
    assert call_counts.calls("gated_norm", "3 groups over 2 ranks: some group has parts on several") == 1
