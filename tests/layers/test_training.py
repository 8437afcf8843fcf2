"""A model made of the layers: trained, compiled in one graph, exported."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from norm_plugin.layers import GemmaRMSNorm, LayerNorm, LayerNormGated, RMSNorm, RMSNormGated
from tests.layers.samples import DTYPES, GROUP, WIDTH, draw, randomized


class TwoLayers(nn.Module):
    """Two decoder layers' worth of norms: every class, both residual forms, a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([RMSNorm(WIDTH), GemmaRMSNorm(WIDTH), RMSNorm(WIDTH, fp32_residual=True)])
        self.linears = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(2)])
        self.gated = nn.ModuleList([RMSNormGated(WIDTH, group_size=GROUP), LayerNormGated(WIDTH)])
        self.last = LayerNorm((4, WIDTH // 4))

    def forward(self, x: Tensor) -> Tensor:
        h, residual = self.norms[0](x), x
        for linear, gated, norm in zip(self.linears, self.gated, self.norms[1:], strict=True):
            h, residual = norm(gated(linear(h), h), residual)
        return self.last((h + residual).unflatten(-1, (4, -1))).flatten(-2)


#: The ops of one pass through TwoLayers, in order.
OPS = ["rmsnorm", "gated_norm", "add_rmsnorm", "gated_norm", "add_rmsnorm", "layernorm"]


def norms(graph: torch.fx.Graph) -> list[str]:
    """The names of our ops in a graph, without overloads."""
    names = [str(node.target).split(".") for node in graph.nodes if node.op == "call_function"]
    return [name[1] for name in names if name[0] == "norm_plugin"]


def loss_and_grads(run: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    loss = run(x).square().mul(torch.linspace(0, 1, WIDTH)).mean()
    loss.backward()
    return loss.detach(), [x.grad, *(p.grad for p in model.parameters())]


def assert_resummed(actual: Tensor, expected: Tensor) -> None:
    """A row summed in another order is off by at most one rounding of the largest value for each term."""
    assert (actual - expected).abs().max() <= 2.0**-24 * WIDTH * expected.abs().max()


def model() -> TwoLayers:
    torch.manual_seed(0)
    return randomized(TwoLayers())


def test_gradients_are_those_of_the_formulas() -> None:
    """A residual norm with gradients for all inputs, against autograd through the formula in fp64."""
    for layer in (RMSNorm(WIDTH, 1e-6, 64), GemmaRMSNorm(WIDTH), RMSNorm(WIDTH, fp32_residual=True)):
        randomized(layer)
        inputs = [draw(4, WIDTH, seed=seed).requires_grad_() for seed in range(3)]
        exact = [t.detach().double().requires_grad_() for t in (*inputs, layer.weight)]
        total = exact[0] + exact[1] + exact[2]
        s = torch.rsqrt(total[:, : layer.variance_size_override].square().mean(-1, keepdim=True) + 1e-6)
        scale = exact[3] + 1 if isinstance(layer, GemmaRMSNorm) else exact[3]
        grads = [draw(4, WIDTH, seed=seed) for seed in (10, 11)]
        torch.autograd.backward([total * s * scale, total], [g.double() for g in grads])
        torch.autograd.backward(layer(*inputs), grads)
        for ours, theirs in zip([*inputs, layer.weight], exact, strict=True):
            # a gradient is a sum of two fp32 terms, or of one for each of 4 rows, each with fewer than 16 roundings
            allowed = 16 * 2.0**-24 * 4 * theirs.grad.abs().max()
            assert (ours.grad.double() - theirs.grad).abs().max() <= allowed


def test_a_step_of_training_lowers_the_loss() -> None:
    net, x = model(), draw(6, WIDTH, seed=0)
    before, grads = loss_and_grads(net, net, x)
    assert all(g is not None and g.isfinite().all() and g.any() for g in grads)
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    after, _ = loss_and_grads(net, net, x)
    assert after < before


@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_in_one_graph_with_one_node_a_norm(dtype: torch.dtype) -> None:
    net, nodes = model().to(dtype), []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        nodes.append(norms(graph.graph))
        return graph.forward

    compiled = torch.compile(net, fullgraph=True, backend=backend, dynamic=True)
    for rows in (6, 3):
        x = draw(rows, WIDTH, seed=0, dtype=dtype)
        expected, actual = loss_and_grads(net, net, x), loss_and_grads(compiled, net, x)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert nodes == [OPS]  # one graph for every number of rows


def test_compiled_forward_and_backward() -> None:
    """The backward formulas of the ops are traced as well."""
    net, x = model(), draw(6, WIDTH, seed=0)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    expected, actual = loss_and_grads(net, net, x), loss_and_grads(compiled, net, x)
    for ours, theirs in zip([actual[0], *actual[1]], [expected[0], *expected[1]], strict=True):
        assert_resummed(ours, theirs)


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="Inductor needs a C++ compiler")
@torch.no_grad()
def test_compiled_by_inductor() -> None:
    """Inductor checks the strides that the ops promise; the forward alone, because its compiler is slow."""
    net, x = model(), draw(6, WIDTH, seed=0)
    assert_resummed(torch.compile(net, fullgraph=True)(x), net(x))


def test_exported() -> None:
    net, x = model().eval(), draw(6, WIDTH, seed=0)
    program = torch.export.export(net, (x,), dynamic_shapes={"x": {0: torch.export.Dim("rows", min=2)}})
    assert norms(program.graph) == OPS
    for rows in (6, 3):
        x = draw(rows, WIDTH, seed=1)
        assert torch.equal(program.module()(x), net(x))
