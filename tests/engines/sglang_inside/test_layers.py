"""SGLang's own norm classes, taken: the bits of SGLang's PyTorch, and the contracts of both its methods."""

import pytest
import torch
from sglang.srt.layers import layernorm as norms

from norm_plugin import settings
from norm_plugin.dispatch import BackendError
from norm_plugin.engines import call_counts, qk_norms, sglang_norms
from tests.engines.sglang_inside.samples import DTYPES, WIDTH, layer, tensor

KINDS = ("RMSNorm", "GemmaRMSNorm", "Gemma3RMSNorm", "Gemma4RMSNorm", "RMSNormWithoutScale", "LayerNorm")
WITH_RESIDUAL = ("RMSNorm", "GemmaRMSNorm", "Gemma3RMSNorm")
STOCK = {kind: getattr(norms, kind).forward_native for kind in KINDS}


@pytest.fixture
def on_cpu(hooks):
    sglang_norms.hook(norms, hooks, "forward_native")


@pytest.fixture
def on_cuda(hooks, monkeypatch):
    """What SGLang calls on a GPU, called here: nothing of it but the tensors knows the difference."""
    monkeypatch.setattr(norms, "is_batch_invariant_mode_enabled", lambda: False)
    sglang_norms.hook(norms, hooks, "forward_cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7, WIDTH), (1, WIDTH), (3, 2, WIDTH), (2, 3, 2, WIDTH)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_bits_of_sglang(on_cpu, kind, shape, dtype):
    norm, x = layer(kind, dtype), tensor(*shape, dtype=dtype)
    before = x.clone()
    assert torch.equal(norm.forward_native(x), STOCK[kind](norm, x))
    assert torch.equal(x, before)
    assert call_counts.calls("layernorm" if kind == "LayerNorm" else "rmsnorm") == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", WITH_RESIDUAL)
def test_the_bits_of_sglang_with_a_residual(on_cpu, kind, dtype):
    norm, x, residual = layer(kind, dtype), tensor(7, WIDTH, dtype=dtype), tensor(7, WIDTH, dtype=dtype)
    before = x.clone(), residual.clone()
    ours, theirs = norm.forward_native(x, residual), STOCK[kind](norm, x.clone(), residual.clone())
    assert all(map(torch.equal, ours, theirs))
    assert torch.equal(x, before[0])  # SGLang's PyTorch leaves both as they are
    assert torch.equal(residual, before[1])
    assert call_counts.calls("add_rmsnorm") == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["RMSNorm", "GemmaRMSNorm"])
def test_a_third_addend(on_cpu, kind, dtype):
    norm, (x, residual, third) = layer(kind, dtype), (tensor(7, WIDTH, dtype=dtype) for _ in range(3))
    ours, theirs = norm.forward_native(x, residual, third), STOCK[kind](norm, x, residual, third)
    assert all(map(torch.equal, ours, theirs))
    assert call_counts.calls("add_rmsnorm") == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounded_before_the_weight(on_cpu, dtype):
    norm = layer("RMSNorm", dtype, cast_x_before_out_mul=True)
    x, residual = tensor(7, WIDTH, dtype=dtype), tensor(7, WIDTH, dtype=dtype)
    assert torch.equal(norm.forward_native(x), STOCK["RMSNorm"](norm, x))
    assert all(map(torch.equal, norm.forward_native(x, residual), STOCK["RMSNorm"](norm, x, residual)))
    assert call_counts.calls("rmsnorm") == call_counts.calls("add_rmsnorm") == 1


@pytest.mark.parametrize("kind", WITH_RESIDUAL)
def test_on_a_gpu_both_are_updated_and_come_back(on_cuda, kind):
    norm, x, residual = layer(kind), tensor(7, WIDTH), tensor(7, WIDTH)
    total = x.float() + residual.float()
    expected = STOCK[kind](norm, x.float(), residual.float())[0].bfloat16()  # of the sum as it is
    out, new_residual = norm.forward_cuda(x, residual)
    assert out is x
    assert new_residual is residual
    assert torch.equal(residual, total.bfloat16())
    assert torch.equal(out, expected)
    assert call_counts.calls("fused_add_rmsnorm") == 1


@pytest.mark.parametrize("kind", WITH_RESIDUAL)
def test_on_a_gpu_x_alone_stays(on_cuda, kind):
    norm, x = layer(kind), tensor(7, WIDTH)
    before = x.clone()
    out = norm.forward_cuda(x)
    assert out.data_ptr() != x.data_ptr()
    assert torch.equal(x, before)


def test_on_a_gpu_a_third_addend_joins_the_residual_first(on_cuda):
    norm, x, residual, third = layer("RMSNorm"), *(tensor(7, WIDTH) for _ in range(3))
    x_before, total = x.clone(), residual + third
    out, new_residual = norm.forward_cuda(x, residual, third)
    assert out is x
    assert new_residual is not residual
    assert torch.equal(new_residual, x_before + total)


def test_the_deterministic_mode_rounds_like_the_eager_chain(hooks, monkeypatch):
    monkeypatch.setattr(norms, "is_batch_invariant_mode_enabled", lambda: True)
    monkeypatch.setattr(norms, "get_exec", _Execution)
    sglang_norms.hook(norms, hooks, "forward_cuda")
    norm, x, residual, third = layer("RMSNorm"), *(tensor(7, WIDTH) for _ in range(3))
    for addends in ((x, residual), (x, residual, third)):
        expected = STOCK["RMSNorm"](norm, *addends)
        assert all(map(torch.equal, norm.forward_cuda(*(t.clone() for t in addends)), expected))
    assert call_counts.calls("fused_add_rmsnorm") == call_counts.calls("add_rmsnorm") == 1


def test_on_policy_training_keeps_the_bits_of_its_trainer(hooks, monkeypatch):
    monkeypatch.setattr(norms, "is_batch_invariant_mode_enabled", lambda: True)
    monkeypatch.setattr(norms, "get_exec", _Execution)
    monkeypatch.setattr(_Execution.deterministic, "rl_on_policy_target", "fsdp")
    monkeypatch.setattr(norms.RMSNorm, "forward_cuda", norms.RMSNorm.forward_native)
    sglang_norms.hook(norms, hooks, "forward_cuda")
    norm, x, residual = layer("RMSNorm"), tensor(7, WIDTH), tensor(7, WIDTH)
    assert all(map(torch.equal, norm.forward_cuda(x, residual), STOCK["RMSNorm"](norm, x, residual)))
    assert call_counts.calls("fused_add_rmsnorm", "on-policy training wants the bits of its trainer") == 1


class _Execution:
    class deterministic:
        rl_on_policy_target = None


@pytest.mark.parametrize("kind", ["RMSNorm", "Gemma4RMSNorm", "GemmaRMSNorm"])
def test_on_a_gpu_more_dimensions_come_back_contiguous(on_cuda, kind):
    norm = layer(kind)
    x = tensor(3, 2, WIDTH).transpose(0, 1)
    out = norm.forward_cuda(x)
    assert out.is_contiguous()
    assert torch.equal(out, STOCK[kind](norm, x))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"var_hidden_size": 48}, "the variance of part of a row"),
        ({"fp32_residual": True}, "an fp32 residual"),
        ({"override_orig_dtype": torch.float32}, "an output of another dtype"),
    ],
)
def test_what_is_left_to_sglang(on_cpu, options, reason):
    norm, x, residual = layer("RMSNorm", **options), tensor(7, WIDTH), tensor(7, WIDTH)
    assert all(map(torch.equal, norm.forward_native(x, residual), STOCK["RMSNorm"](norm, x, residual)))
    assert call_counts.calls("add_rmsnorm", reason) == 1
    assert call_counts.calls("add_rmsnorm") == 0
    with settings.override(strict=True), pytest.raises(BackendError, match=reason):
        norm.forward_native(x, residual)


def test_a_norm_that_quantises_is_left_to_sglang(hooks, monkeypatch):
    seen = []
    monkeypatch.setattr(norms.RMSNorm, "forward_cuda", lambda self, x, residual=None, post_residual_addition=None,
                        quant_linear=None: seen.append(quant_linear))  # fmt: skip
    monkeypatch.setattr(norms, "_fp8_static_input_scale", lambda linear: 1.0 if linear == "fp8" else None)
    sglang_norms.hook(norms, hooks, "forward_cuda")
    norm, x = layer("RMSNorm"), tensor(7, WIDTH)
    norm.forward_cuda(x, quant_linear="fp8")
    norm.forward_cuda(x, None, None, "fp8")
    norm.fuse_input_quant("fp8")
    norm.forward_cuda(x)
    assert seen == ["fp8", "fp8", None]
    assert call_counts.calls("rmsnorm", "SGLang quantises in its norm") == 3
    norm.fuse_input_quant("bf16")
    assert torch.is_tensor(norm.forward_cuda(x))
    assert call_counts.calls("rmsnorm") == 1


def test_an_argument_of_another_version(hooks, monkeypatch):
    monkeypatch.setattr(norms.RMSNorm, "forward_cuda", lambda self, x, residual=None, addition=None, later=None: later)
    sglang_norms.hook(norms, hooks, "forward_cuda")
    assert layer("RMSNorm").forward_cuda(tensor(7, WIDTH), later="unknown") == "unknown"
    assert call_counts.calls("rmsnorm", "an argument later") == 1


def test_no_rows(on_cpu):
    norm, nothing = layer("RMSNorm"), torch.empty(0, WIDTH, dtype=torch.bfloat16)
    assert norm.forward_native(nothing).shape == (0, WIDTH)
    with settings.override(strict=True):
        assert norm.forward_native(nothing, nothing)[0].shape == (0, WIDTH)
    assert call_counts.calls("rmsnorm", "no rows") == 1


def test_what_sglang_compiles_is_its_own(on_cpu):
    norm, x = layer("RMSNorm"), tensor(7, WIDTH)
    norm.enter_torch_compile(num_tokens=1)
    norm.enter_torch_compile(num_tokens=1)  # of a layer that is shared
    assert call_counts.calls("rmsnorm", "left to torch.compile") == 1
    traced = torch.compile(norm.forward_native, backend="eager", fullgraph=True)
    assert torch.equal(traced(x), STOCK["RMSNorm"](norm, x))
    assert call_counts.calls("rmsnorm") == 0
    norm.leave_torch_compile()
    norm(x)
    assert call_counts.calls("rmsnorm") == 1


def test_families(hooks):
    with settings.override(ops=frozenset({"gemma"})):
        sglang_norms.hook(norms, hooks, "forward_native")
    for kind in ("RMSNorm", "LayerNorm", "RMSNormWithoutScale"):
        assert getattr(norms, kind).forward_native is STOCK[kind]
    for kind in ("GemmaRMSNorm", "Gemma3RMSNorm", "Gemma4RMSNorm"):
        assert getattr(norms, kind).forward_native is not STOCK[kind]


@pytest.mark.parametrize(("asked", "heads_calls", "other_calls"), [("qknorm", 1, 0), ("rmsnorm", 0, 1)])
def test_the_norms_of_q_and_k_are_a_family(hooks, asked, heads_calls, other_calls):
    with settings.override(ops=frozenset({asked})):
        sglang_norms.hook(norms, hooks, "forward_native")
    model = torch.nn.ModuleDict({"q_norm": layer("RMSNorm"), "norm": layer("RMSNorm")})
    qk_norms.learn(model)
    x = tensor(7, WIDTH)
    model["q_norm"].forward_native(x)
    assert call_counts.calls("rmsnorm") == heads_calls
    model["norm"].forward_native(x)
    assert call_counts.calls("rmsnorm") == heads_calls + other_calls


def test_the_way_back(hooks):
    sglang_norms.hook(norms, hooks, "forward_native")
    norm, x = layer("RMSNorm"), tensor(7, WIDTH)
    bound = norm.forward_native  # SGLang 0.5.17 keeps it from when a layer is made
    hooks.undo()
    assert norms.RMSNorm.forward_native is STOCK["RMSNorm"]
    assert torch.equal(bound(x), STOCK["RMSNorm"](norm, x))
    assert call_counts.rows() == ()
