"""vLLM's layers that leave an all-reduce pending, and its norms that take it: as on the first of two equal ranks."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from vllm.distributed import parallel_state
from vllm.model_executor.layers import linear
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm
from vllm.model_executor.layers.linear import RowParallelLinear

from norm_plugin import ranks, settings
from norm_plugin.engines import call_counts, vllm, vllm_ranks
from norm_plugin.engines.installed_hooks import installed
from norm_plugin.native import ranks as twin
from norm_plugin.ranks.pending import Pending

WIDTH = 64


class Block(nn.Module):
    """The end of one block and the begin of the next, in the words of vLLM's models."""

    def __init__(self, norm, width=WIDTH):
        super().__init__()
        self.o_proj = RowParallelLinear(width, width, bias=False)
        self.norm = norm(width)

    def forward(self, x, residual):
        x, _ = self.o_proj(x)
        return self.norm(x, residual)


class Sandwich(Block):
    def __init__(self, norm):
        super().__init__(norm)
        self.post = norm(WIDTH)

    def forward(self, x, residual):
        x, _ = self.o_proj(x)
        return self.norm(self.post(x), residual)


class Alone(Block):
    def forward(self, x, residual):
        x, _ = self.o_proj(x)
        return self.norm(x) + residual


class Other(Block):
    """A block whose sum something else takes first."""

    def forward(self, x, residual):
        x, _ = self.o_proj(x)
        return self.norm(x * 0.5, residual)


class Again(Block):
    """A block that uses the sum again, after the norm, which has overwritten the residual and maybe the sum."""

    def forward(self, x, residual):
        x, _ = self.o_proj(x)
        kept = x
        normed, total = self.norm(x.view(x.shape), residual)
        return normed, total, kept * 2


class Written(Sandwich):
    """A block that writes the sum between the norm of it and the use of that norm."""

    def forward(self, x, residual):
        x, _ = self.o_proj(x)
        post = self.post(x)
        x.add_(1)
        return (*self.norm(post, residual), x)


class Bare(Block):
    """A model that returns the sum."""

    def forward(self, x, residual):
        x, _ = self.o_proj(x)
        return {"x": x, "more": [x]}


@pytest.fixture
def two_ranks(monkeypatch):
    """All-reduces of vLLM, in place as on a CPU, and those of the twin, as if another rank had the same numbers."""
    count = SimpleNamespace(theirs=0)

    def all_reduce(part):
        count.theirs += 1
        return part.mul_(2)

    monkeypatch.setattr(linear, "tensor_model_parallel_all_reduce", all_reduce)
    monkeypatch.setattr(twin, "allreduce", lambda part, group: part * 2)
    return count


def a_config(width=WIDTH, use_ubatching=False):
    """What is asked of a model's configuration."""
    model = SimpleNamespace(get_hidden_size=lambda: width, dtype=torch.bfloat16)
    return SimpleNamespace(model_config=model, parallel_config=SimpleNamespace(use_ubatching=use_ubatching))


CONFIG = a_config()


def made(block, norm):
    model = nn.Sequential(block(norm))
    for parameter in model.parameters():
        parameter.data = (0.1 * torch.randn(parameter.shape) + (parameter.dim() == 1)).bfloat16()
    layer = model[0].o_proj
    layer.tp_size = 2
    layer.quant_method.process_weights_after_loading(layer)
    return model


def loaded(model, config=CONFIG, compiled=frozenset()):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel_state.get_tp_group(), "world_size", 2)
        vllm_ranks.loaded(installed["vllm"], model, config, compiled)
    call_counts.name_layers(model)


def both(block, norm, backend="native", calls=1):
    """The answers of stock and ours to the same inputs."""
    model = made(block, norm)
    x = torch.randn(2, 5, WIDTH).bfloat16()

    def answer():
        return model[0](*x.clone().unbind(0))

    stock = answer()
    with settings.override(backend=backend):
        vllm.register()
        loaded(model)
        ours = [answer() for _ in range(calls)][-1]
    return stock, ours


def rows():
    """Calls by op, layer and reason."""
    return {(row.op, row.layer[0], row.reason): row.calls for row in call_counts.rows()}


def assert_equal(stock, ours):
    assert len(stock) == len(ours)
    for one, other in zip(stock, ours, strict=True):
        assert torch.equal(one, other + 0)


@pytest.mark.parametrize("norm", [RMSNorm, GemmaRMSNorm])
def test_add_and_norm(two_ranks, norm):
    assert_equal(*both(Block, norm))
    assert rows() == {("allreduce_add_rmsnorm", "0.norm", ""): 1}
    assert two_ranks.theirs == 1  # stock


def test_sandwich(two_ranks):
    assert_equal(*both(Sandwich, GemmaRMSNorm))
    assert rows() == {("allreduce_norm_add_norm", "0.norm", ""): 1, ("allreduce_norm_add_norm", "0.post", ""): 1}


@pytest.mark.parametrize("norm", [RMSNorm, GemmaRMSNorm])
def test_without_a_residual(two_ranks, norm):
    stock, ours = both(Alone, norm)
    assert torch.equal(stock, ours)
    assert rows() == {("allreduce_rmsnorm", "0.norm", ""): 1}


def test_a_sum_that_something_else_takes_is_vllms_from_then_on(two_ranks):
    assert_equal(*both(Other, RMSNorm, calls=3))
    reason = "its sum goes to torch.Tensor.mul"
    assert rows() == {("allreduce", "0.o_proj", reason): 3, ("fused_add_rmsnorm", "0.norm", ""): 3}
    assert two_ranks.theirs == 1 + 3


def test_a_use_after_the_norm_sees_the_sum(two_ranks):
    stock, ours = both(Again, GemmaRMSNorm, calls=2)  # which keeps its inputs
    assert_equal(stock, ours)
    reason = "its sum goes to torch.Tensor.mul"
    assert rows() == {("allreduce", "0.o_proj", reason): 2, ("allreduce_add_rmsnorm", "0.norm", ""): 2}


def test_a_sum_that_is_written_before_its_norm_is_used(two_ranks):
    assert_equal(*both(Written, GemmaRMSNorm))


def test_the_norm_of_two_numerics(two_ranks):
    """The post-norm has another eps: each runs by itself."""
    model = made(Sandwich, GemmaRMSNorm)
    model[0].post.variance_epsilon = 0.5
    x = torch.randn(2, 5, WIDTH).bfloat16()
    stock = model[0](*x.clone().unbind(0))
    with settings.override(backend="native"):
        vllm.register()
        loaded(model)
        assert_equal(stock, model[0](*x.clone().unbind(0)))
    assert rows() == {("allreduce_rmsnorm", "0.post", ""): 1, ("add_rmsnorm", "0.norm", ""): 1}


def test_a_residual_of_another_dtype(two_ranks):
    model = made(Block, RMSNorm)
    x, residual = torch.randn(2, 5, WIDTH).unbind(0)
    with settings.override(backend="native"):
        vllm.register()
        loaded(model)
        hidden, _ = model[0].o_proj(x.bfloat16())
        assert type(hidden) is Pending
        with pytest.raises(RuntimeError):  # as stock: vLLM's norm refuses it
            model[0].norm(hidden, residual.double()[:, :3])


def test_nothing_pending_leaves_the_model(two_ranks):
    model = made(Bare, RMSNorm)
    x = torch.randn(2, 5, WIDTH).bfloat16()
    with settings.override(backend="native"):
        vllm.register()
        loaded(model[0])
        assert type(model[0].o_proj(x[0])[0]) is Pending
        out = model[0](*x.unbind(0))
    assert type(out["x"]) is type(out["more"][0]) is torch.Tensor


@pytest.mark.parametrize(
    ("backend", "given", "reason"),
    [
        ("triton", CONFIG, "symmetric memory needs CUDA, and the tensors are on cpu"),
        ("native", a_config(use_ubatching=True), "two forwards run at once"),
    ],
)
def test_left_to_vllm(two_ranks, monkeypatch, backend, given, reason):
    monkeypatch.setattr(ranks.workspace, "why_not", lambda device, size: "symmetric memory needs CUDA, and the tensors "
                        "are on cpu")  # fmt: skip
    model = made(Block, GemmaRMSNorm)
    with settings.override(backend=backend):
        vllm.register()
        loaded(model, given)
        hidden, _ = model[0].o_proj(torch.randn(5, WIDTH).bfloat16())
    assert type(hidden) is torch.Tensor
    assert [(row.op, row.layer[0]) for row in call_counts.rows()] == [("allreduce", "0.o_proj")]
    assert call_counts.rows()[0].reason.endswith(reason)


@pytest.mark.parametrize("bits", ["0", "1"], ids=["", "batch-invariant"])
def test_large_parts_are_vllms_where_it_has_multicast(two_ranks, monkeypatch, bits):
    custom = SimpleNamespace(disabled=False, should_custom_ar=lambda part: len(part) < 8)
    multicast = SimpleNamespace(disabled=False, should_use_symm_mem=lambda part: len(part) < 32)
    communicator = SimpleNamespace(ca_comm=custom, symm_mem_comm=multicast)
    monkeypatch.setattr(parallel_state.get_tp_group(), "device_communicator", communicator)
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", bits)
    model = made(Block, RMSNorm)
    with settings.override(backend="native"):
        vllm.register()
        loaded(model)
        kinds = [type(model[0].o_proj(torch.randn(rows, WIDTH).bfloat16())[0]) for rows in (7, 8, 31, 32)]
    theirs = torch.Tensor if bits == "0" else Pending
    assert kinds == [Pending, theirs, theirs, Pending]
    if bits == "0":
        assert rows() == {("allreduce", "0.o_proj", "NVLink multicast is faster"): 2}


@pytest.mark.parametrize("why", ["no norm", "another width", "compiled", "left out"])
def test_layers_that_never_leave_it_pending(two_ranks, why):
    model = nn.Sequential(made(Block, RMSNorm)[0].o_proj) if why == "no norm" else made(Block, RMSNorm)
    given = a_config(width=2 * WIDTH if why == "another width" else WIDTH)
    compiled = {id(module) for module in model.modules()} if why == "compiled" else set()
    with settings.override(backend="native", ops=frozenset({"gemma"} if why == "left out" else settings.FAMILIES)):
        vllm.register()
        loaded(model, given, compiled)
        layer = next(m for m in model.modules() if isinstance(m, RowParallelLinear))
        assert type(layer(torch.randn(5, WIDTH).bfloat16())[0]) is torch.Tensor
    assert rows() == {}


def test_undone(two_ranks):
    model = made(Block, RMSNorm)
    with settings.override(backend="native"):
        vllm.register()
        loaded(model)
        vllm.undo()
        assert type(model[0].o_proj(torch.randn(5, WIDTH).bfloat16())[0]) is torch.Tensor
        assert not model._forward_hooks
        vllm.register()
        assert type(model[0].o_proj(torch.randn(5, WIDTH).bfloat16())[0]) is torch.Tensor


def test_a_second_model_does_not_make_the_workspace_narrower(two_ranks, monkeypatch):
    """As a draft model, which is loaded after its target."""
    made_for = []
    prepare = ranks.prepare
    monkeypatch.setattr(
        ranks, "prepare", lambda *args, **how: (made_for.append(how["width"]), prepare(*args, **how))[1]
    )
    models = [nn.Sequential(Block(RMSNorm, width)) for width in (WIDTH, WIDTH // 2, 2 * WIDTH)]
    with settings.override(backend="native"):
        vllm.register()
        for model, width in zip(models, (WIDTH, WIDTH // 2, 2 * WIDTH), strict=True):
            loaded(model, a_config(width))
    assert made_for == [WIDTH, 2 * WIDTH]


def test_batch_invariant(two_ranks, monkeypatch):
    """vLLM's own norms stay, but the all-reduces are ours, which depend on nothing but their numbers."""
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    assert_equal(*both(Sandwich, GemmaRMSNorm))
    assert rows() == {("allreduce_norm_add_norm", "0.norm", ""): 1, ("allreduce_norm_add_norm", "0.post", ""): 1}
    x = torch.randn(5, WIDTH).bfloat16()
    before = rows()
    GemmaRMSNorm(WIDTH)(x)
    assert rows() == before
