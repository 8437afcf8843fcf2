"""The layers under trainers: activation checkpointing, autocast, DDP and FSDP2. Each runs our ops forward and backward,
and gives the gradients of a plain run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from norm_plugin import dispatch, settings
from tests.layers.samples import WIDTH, draw
from tests.layers.test_training import OPS, TwoLayers, assert_resummed, loss_and_grads, model

BACKWARD = ["rmsnorm_backward", "gated_norm_backward", "rmsnorm_backward", "gated_norm_backward", "rmsnorm_backward",
            "layernorm_backward"]  # fmt: skip
RANKS, ROWS = 2, 6


def counted() -> dict[str, int]:
    return {name: dispatch.calls(name) for name in {*OPS, *BACKWARD}}


def calls_of(run: Callable[[], object]) -> dict[str, int]:
    """How often `run` calls each op."""
    before = counted()
    run()
    return {name: count - before[name] for name, count in counted().items()}


def expected(forwards: int = 1) -> dict[str, int]:
    return {name: forwards * OPS.count(name) + BACKWARD.count(name) for name in {*OPS, *BACKWARD}}


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    """The backward runs the forward again, which gives the same bits."""
    net, x = model(), draw(ROWS, WIDTH, seed=0)
    plain = loss_and_grads(net, net, x)
    found: list[tuple[Tensor, list[Tensor]]] = []
    count = calls_of(
        lambda: found.append(loss_and_grads(lambda h: checkpoint(net, h, use_reentrant=reentrant), net, x))
    )
    assert count == expected(forwards=2)
    torch.testing.assert_close(found[0], plain, rtol=0, atol=0)


def test_autocast() -> None:
    """Linear layers return bf16, norms take bf16 with fp32 weights, and gradients have the dtypes of their
    parameters."""
    net, x = model(), draw(ROWS, WIDTH, seed=0)

    def run(h: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return net(h)

    found: list[tuple[Tensor, list[Tensor]]] = []
    assert calls_of(lambda: found.append(loss_and_grads(run, net, x))) == expected()
    for ours, exact in zip(found[0][1], loss_and_grads(net, net, x)[1], strict=True):
        assert ours.dtype == exact.dtype == torch.float32
        assert (ours - exact).norm() <= 0.05 * exact.norm()  # six bf16 roundings of 2^-9 and their gradients


KINDS = ("DDP", "FSDP2", "FSDP2, bf16", "FSDP2, checkpointed")


def wrapped(net: TwoLayers, kind: str, mesh: DeviceMesh) -> Callable[[Tensor], Tensor]:
    """The model as a trainer wraps it."""
    if kind == "DDP":
        return DistributedDataParallel(net)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if kind == "FSDP2, bf16" else None)
    for part in (*net.norms, *net.linears, *net.gated, net.last):
        fully_shard(part, mesh=mesh, mp_policy=policy)
    sharded = fully_shard(net, mesh=mesh, mp_policy=policy)
    return sharded if "checkpointed" not in kind else lambda h: checkpoint(sharded, h, use_reentrant=False)


def step(forward: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """The loss of loss_and_grads, and its backward."""
    forward(x).square().mul(torch.linspace(0, 1, WIDTH)).mean().backward()


def train(rank: int, folder: str) -> None:
    """One rank: trains on its half of the batch in every trainer, and writes its gradients and counts to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    mesh = dist.init_device_mesh("cpu", (RANKS,))
    found = {}
    with settings.override(backend="native", strict=False, compile=False):
        for kind in KINDS:
            net = model()
            x = draw(ROWS, WIDTH, seed=0)[rank * ROWS // RANKS : (rank + 1) * ROWS // RANKS]
            forward = wrapped(net, kind, mesh)
            count = calls_of(partial(step, forward, x))
            grads = {name: p.grad for name, p in net.named_parameters()}
            found[kind] = count, {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in grads.items()}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(train, (str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.skipif(sys.platform != "linux", reason="gloo ranks are started as on a server")
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_have_the_gradients_of_one_process(kind: str, ranks: list[dict[str, Any]]) -> None:
    net = model()
    loss_and_grads(net, net, draw(ROWS, WIDTH, seed=0))
    for found in ranks:
        count, grads = found[kind]
        assert count == expected(forwards=2 if "checkpointed" in kind else 1)
        for name, parameter in net.named_parameters():
            if "bf16" in kind:
                assert (grads[name] - parameter.grad).norm() <= 0.05 * parameter.grad.norm(), name
            else:
                assert_resummed(grads[name], parameter.grad)
