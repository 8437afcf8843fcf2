"""The native ops across ranks, on a CPU with gloo: what they compute, what they refuse, and who knows the group."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import norm_plugin
from norm_plugin import dispatch, ranks, settings
from norm_plugin.native.ranks import allreduce
from tests.ranks.processes import together

CPU = torch.device("cpu")


@pytest.mark.parametrize("size", [2, 4])
def test_on_several_ranks(size: int, tmp_path: Path) -> None:
    together(size, tmp_path, "-m", "tests.ranks.test_native", NORM_PLUGIN="auto")


@pytest.fixture
def group(tmp_path: Path) -> Iterator[dist.ProcessGroup | None]:
    """A group of one rank, in this process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_a_group_that_was_not_prepared_is_named(group: dist.ProcessGroup) -> None:
    x = torch.ones(2, 8)
    with pytest.raises(ValueError, match=r"ranks\.prepare"):
        ranks.allreduce_rmsnorm(x, None, group)


def test_one_rank_has_no_workspace(group: dist.ProcessGroup) -> None:
    made = ranks.prepare(group, width=8, dtype=torch.float32, device=CPU)
    assert "one rank" in made.reason
    x = torch.randn(3, 8)
    assert torch.equal(ranks.allreduce_rmsnorm(x, None, group), norm_plugin.rmsnorm(x, None))
    ranks.free(group)
    with pytest.raises(ValueError, match=r"ranks\.prepare"):
        ranks.allreduce_rmsnorm(x, None, group)


def test_strict_mode_says_why_no_kernel_runs(group: dist.ProcessGroup) -> None:
    ranks.prepare(group, width=8, dtype=torch.float32, device=CPU)
    with (
        settings.override(backend="triton", strict=True),
        pytest.raises(dispatch.BackendError, match="allreduce_rmsnorm cannot run on Triton"),
    ):
        ranks.allreduce_rmsnorm(torch.ones(1, 8), None, group)
    ranks.free(group)


def test_arguments_are_checked(group: dist.ProcessGroup) -> None:
    ranks.prepare(group, width=8, dtype=torch.float32, device=CPU)
    x, weight = torch.ones(2, 8), torch.ones(8)
    with pytest.raises(ValueError, match="residual has shape"):
        ranks.allreduce_add_rmsnorm(x, torch.ones(3, 8), weight, group)
    with pytest.raises(ValueError, match="weight has shape"):
        ranks.allreduce_add_rmsnorm(x, x, torch.ones(7), group)
    with pytest.raises(ValueError, match="numerics is 'none'"):
        ranks.allreduce_add_rmsnorm(x, x, weight, group, numerics="none")
    with pytest.raises(TypeError, match="group is ''"):
        torch.ops.norm_plugin.allreduce_rmsnorm(x, weight, "")
    ranks.free(group)


def on_a_rank() -> None:
    """What each of several ranks does."""
    rank, size, folder = int(os.environ["RANK"]), int(os.environ["SIZE"]), os.environ["FOLDER"]
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    group = dist.group.WORLD
    assert group is not None
    made = ranks.prepare(group, width=96, dtype=torch.bfloat16, device=CPU)
    assert "CUDA" in made.reason, made.reason
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        parts = [torch.randn(5, 96, generator=torch.Generator().manual_seed(q)).to(dtype) for q in range(size)]
        parts = [torch.where(torch.arange(96) % 7 == 0, torch.tensor(-0.0, dtype=dtype), p) for p in parts]
        wide = torch.promote_types(dtype, torch.float32)
        total = torch.zeros(5, 96, dtype=wide)
        for part in parts:
            total = total + part.to(wide)
        expected = total.to(dtype) + 0.0
        part, residual, weight = parts[rank], torch.randn(5, 96).to(dtype), torch.rand(96).to(dtype)
        kept = part.clone()
        summed = allreduce(part, group.group_name)
        assert torch.equal(summed, expected), f"{dtype}: the sum is not that of ranks 0 to {size - 1}, rounded once"
        assert not torch.signbit(summed[:, ::7]).any(), "a zero is negative"
        out, new_residual = ranks.allreduce_add_rmsnorm(part, residual, weight, group, numerics="vllm_c", gemma=True)
        theirs = norm_plugin.add_rmsnorm(expected, residual, weight, numerics="vllm_c", gemma=True)
        assert torch.equal(out, theirs[0])
        assert torch.equal(new_residual, theirs[1])
        assert torch.equal(ranks.allreduce_rmsnorm(part, weight, group), norm_plugin.rmsnorm(expected, weight))
        post = torch.rand(96).to(dtype)
        both = ranks.allreduce_norm_add_norm(part, residual, post, weight, group)
        theirs = norm_plugin.add_rmsnorm(norm_plugin.rmsnorm(expected, post), residual, weight)
        assert torch.equal(both[0], theirs[0])
        assert torch.equal(both[1], theirs[1])
        assert torch.equal(part.view(torch.uint8), kept.view(torch.uint8)), "the part was written"
        one = ranks.allreduce_add_rmsnorm(part[2:3], residual[2:3], weight, group, numerics="vllm_c", gemma=True)
        assert torch.equal(one[0], out[2:3]), "a row depends on the others"
    assert dispatch.calls("allreduce_add_rmsnorm", "native") == 8
    ranks.free(group)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    on_a_rank()
