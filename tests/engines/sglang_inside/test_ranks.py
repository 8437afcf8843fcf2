"""SGLang's seam across ranks, in one process: who is asked, who answers, and what happens where ours cannot."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from sglang.srt import runtime_context
from sglang.srt.layers import dp_attention, flashinfer_comm_fusion
from sglang.srt.layers import layernorm as norms
from sglang.srt.layers.layer_boundary import exit as boundary_exit
from sglang.srt.layers.layer_boundary.fusions import allreduce
from sglang.srt.layers.layer_boundary.residual import add_norm
from torch import nn

from norm_plugin import kernels, settings
from norm_plugin.dispatch import BackendError
from norm_plugin.engines import call_counts, common, sglang_norms, sglang_ranks
from norm_plugin.native.rms import add_rmsnorm
from tests.engines.sglang_inside.samples import WIDTH, layer, tensor

ASKED = (add_norm, allreduce, boundary_exit)
STOCK = [module.flashinfer_ar_fusion_applies for module in ASKED]


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path_factory.mktemp('meet')}/f", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


class Coordinator:
    """SGLang's group of two ranks, of which the other has the same numbers."""

    def __init__(self, group):
        self.device_group, self.reduced = group, 0

    def all_reduce(self, x):
        self.reduced += 1
        return x + x


class Engine:
    """A model of SGLang's norms between two ranks, as far as the seam sees it."""

    def __init__(self, hooks, group, monkeypatch):
        self.hooks, self.coordinator, self.model = hooks, Coordinator(group), nn.Module()
        self.model.rms, self.model.gemma = layer("RMSNorm"), layer("GemmaRMSNorm")
        self.model.hf = layer("RMSNorm", cast_x_before_out_mul=True)
        self.parallel = SimpleNamespace(
            tp_size=2, attn_tp_size=2, moe_tp_size=2, moe_ep_size=1, tp_group=self.coordinator
        )
        self.comm = SimpleNamespace(flashinfer_allreduce_fusion_backend=None)
        self.deterministic = SimpleNamespace(enable_deterministic_inference=False, rl_on_policy_target=None)
        execution = SimpleNamespace(comm=self.comm, deterministic=self.deterministic)
        for module in (runtime_context, norms, add_norm, flashinfer_comm_fusion):
            monkeypatch.setattr(module, "get_exec", lambda: execution)
        for module in (runtime_context, norms):
            monkeypatch.setattr(module, "get_parallel", lambda: self.parallel)
        monkeypatch.setattr(dp_attention, "is_dp_attention_enabled", lambda: False)
        monkeypatch.setattr(add_norm, "is_dp_attention_enabled", lambda: False)
        config = SimpleNamespace(hidden_size=WIDTH, dtype=torch.bfloat16)
        self.runner = SimpleNamespace(model=self.model, model_config=config, device="cpu")
        sglang_norms.hook(norms, hooks, "forward_native")
        self.seam = sglang_ranks.Seam(hooks)
        self.seam.hook_question(add_norm, hooks)
        self.seam.hook_answer(norms, hooks)

    def load(self, why=lambda layer: ""):
        return self.seam.load(self.runner, in_place=False, why=why)

    @staticmethod
    def asked(rows=4):
        return {module.flashinfer_ar_fusion_applies(rows) for module in ASKED}


@pytest.fixture
def engine(hooks, group, monkeypatch):
    return Engine(hooks, group, monkeypatch)


def sample():
    return tensor(7, WIDTH), tensor(7, WIDTH)


def test_all_copies_of_the_question_are_answered_and_restored(engine):
    assert engine.asked() == {False}  # nothing is loaded
    engine.load()
    assert (engine.asked(), engine.asked(100_000), engine.asked(0)) == ({True}, {True}, {False})
    engine.hooks.undo()
    assert [module.flashinfer_ar_fusion_applies for module in ASKED] == STOCK


@pytest.mark.parametrize(
    ("name", "numerics", "gemma"), [("rms", "fp32", False), ("hf", "hf", False), ("gemma", "vllm_c", True)]
)
def test_a_norm_completes_its_sum(engine, name, numerics, gemma):
    engine.load()
    norm, (x, residual) = getattr(engine.model, name), sample()
    before = residual.clone()
    out, total = norm.forward_with_allreduce_fusion(x, residual)
    expected = add_rmsnorm(x, residual, norm.weight, 1e-5, numerics, gemma)
    assert all(map(torch.equal, (out, total), expected))
    assert torch.equal(residual, before)
    assert (engine.coordinator.reduced, call_counts.calls(sglang_ranks.OP)) == (0, 1)


def test_where_there_is_nothing_to_add_to_there_is_no_sum(engine):
    engine.load()
    x, _ = sample()
    assert torch.equal(engine.model.rms.forward_with_allreduce_fusion(x), engine.model.rms.forward_native(x))


@pytest.mark.parametrize("addition", [False, True])
def test_what_ours_cannot_do_is_summed_apart(engine, addition, monkeypatch):
    engine.load()
    (x, residual), three = sample(), tensor(7, WIDTH) if addition else None
    before = residual.clone()
    expected = norms.RMSNorm.forward_native.__wrapped__(engine.model.rms, x + x, residual.clone(), three)
    reason = "an argument post_residual_addition"
    if not addition:
        reason = "it is Sunday"

        def refuse(*args):
            raise kernels.Refusal(reason)

        monkeypatch.setattr(kernels, "unavailable", lambda device: "")
        monkeypatch.setattr(kernels, "find", lambda kind, op: refuse)
    with settings.override(backend="native" if addition else "triton"):
        got = engine.model.rms.forward_with_allreduce_fusion(x, residual, three)
    assert all(map(torch.equal, got, expected))
    assert torch.equal(residual, before)
    assert engine.coordinator.reduced == 1
    assert (call_counts.calls(sglang_ranks.OP), call_counts.calls(sglang_ranks.OP, reason)) == (0, 1)


def test_a_compiler_sees_sums_apart(engine, monkeypatch):
    """It may have been asked eagerly, and then compile only the norm."""
    engine.load()
    x, residual = sample()
    expected = norms.RMSNorm.forward_native.__wrapped__(engine.model.rms, x + x, residual)
    for module in (common, sglang_ranks):
        monkeypatch.setattr(module, "traced", lambda: True)
    assert engine.asked() == {False}
    assert all(map(torch.equal, engine.model.rms.forward_with_allreduce_fusion(x, residual), expected))
    assert engine.coordinator.reduced == 1


def test_strict_forbids_to_sum_apart(engine):
    engine.load(why=lambda layer: "it has none" if layer is engine.model.rms else "")
    with settings.override(strict=True), pytest.raises(BackendError, match="it has none"):
        engine.model.rms.forward_with_allreduce_fusion(*sample())


NO = {
    "attention is data parallel": lambda e, m: m.setattr(dp_attention, "is_dp_attention_enabled", lambda: True),
    "not summed over all ranks": lambda e, m: setattr(e.parallel, "attn_tp_size", 1),
    "FlashInfer, trtllm": lambda e, m: setattr(e.comm, "flashinfer_allreduce_fusion_backend", "trtllm"),
    "leaves no sum to a norm": lambda e, m: setattr(e.runner, "model", nn.Linear(2, 2)),
}


@pytest.mark.parametrize("reason", NO)
def test_reasons_against_it(engine, monkeypatch, reason):
    NO[reason](engine, monkeypatch)
    assert reason in engine.load()
    assert reason in engine.seam.why_not
    assert engine.asked() == {False}


def test_without_a_hook_for_the_answer_nothing_is_asked_for(engine):
    del engine.hooks.live[sglang_ranks.ANSWER]
    assert "no hook" in engine.load()


def test_a_family_that_was_not_asked_for(engine):
    assert "gemma was left out" in engine.load(why=lambda layer: "gemma was left out")


def test_triton_without_the_memory_of_the_ranks(engine):
    """No GPU is here, and our native op would be slower than what SGLang has."""
    with settings.override(backend="triton"):
        assert "the group has one rank" in engine.load()
        assert engine.asked() == {False}


def test_deterministic_mode_takes_it_from_flashinfer(engine):
    engine.comm.flashinfer_allreduce_fusion_backend = "trtllm"
    engine.deterministic.enable_deterministic_inference = True
    engine.load()
    assert engine.asked() == {True}


def test_a_second_model_does_not_take_back_what_the_first_has(engine):
    engine.load()
    engine.runner.model = nn.Linear(2, 2)
    engine.load()
    assert engine.asked() == {True}


def test_one_rank_has_no_seam(engine):
    engine.parallel.tp_size = 1
    assert engine.load() == ""
    assert engine.asked() == {False}


def test_sums_apart_are_counted(engine, monkeypatch):
    groups = SimpleNamespace(GroupCoordinator=Coordinator, __name__="groups")
    engine.seam.hook_groups(groups, engine.hooks)
    engine.load()
    Coordinator(None).all_reduce(tensor(2, WIDTH))  # another group
    engine.coordinator.all_reduce(tensor(2, WIDTH))
    assert call_counts.calls("allreduce", sglang_ranks.NOT_AT_SEAM) == 1
