"""All-reduce, residual add and norm: ours in one kernel, beside what else does it, in replayed CUDA graphs.

    python -m benchmarks.across_ranks --ranks 2 --out FILE [--with ours nccl vllm flashinfer] [--lanes 256 512]

A time is the slowest rank's median of a call, in microseconds. vllm: its custom all-reduce, then our norm. nccl: an
all-reduce of NCCL's, then our norm. flashinfer: its fused kernel, backend trtllm (no NVLink multicast).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

import norm_plugin
from norm_plugin import ranks, settings
from norm_plugin.kernels import ranks as kernel

ROWS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048, 8192]
WIDTHS = [4096, 8192]
EPS = 1e-6


class TooLarge(Exception):
    """A contender does not take so many rows."""


#: One call on (part, residual, weight).
Call = Callable[[Tensor, Tensor, Tensor], Any]


@contextmanager
def ours(group: dist.ProcessGroup, device: torch.device) -> Iterator[Call]:
    ranks.prepare(group, width=max(WIDTHS), dtype=torch.bfloat16, device=device)
    yield lambda part, residual, weight: ranks.allreduce_add_rmsnorm(part, residual, weight, group, EPS)
    ranks.free(group)


@contextmanager
def nccl(group: dist.ProcessGroup, device: torch.device) -> Iterator[Call]:
    def call(part: Tensor, residual: Tensor, weight: Tensor) -> None:
        dist.all_reduce(part, group=group)
        norm_plugin.fused_add_rmsnorm(part, residual, weight, EPS)

    yield call


@contextmanager
def vllm(group: dist.ProcessGroup, device: torch.device) -> Iterator[Call]:
    from vllm.distributed.device_communicators.custom_all_reduce import CustomAllreduce

    custom = CustomAllreduce(dist.new_group(backend="gloo"), device)

    def call(part: Tensor, residual: Tensor, weight: Tensor) -> None:
        total = custom.custom_all_reduce(part)
        if total is None:
            raise TooLarge("too large for vLLM's custom all-reduce")
        norm_plugin.fused_add_rmsnorm(total, residual, weight, EPS)

    call.capturing = custom.capture  # type: ignore[attr-defined]
    yield call
    custom.close()


@contextmanager
def flashinfer(group: dist.ProcessGroup, device: torch.device) -> Iterator[Call]:
    import flashinfer.comm as comm

    made = comm.create_allreduce_fusion_workspace(
        backend="trtllm", world_size=group.size(), rank=group.rank(), max_token_num=2048, hidden_dim=max(WIDTHS),
        dtype=torch.bfloat16,
    )  # fmt: skip

    def call(part: Tensor, residual: Tensor, weight: Tensor) -> None:
        if len(part) > 2048:
            raise TooLarge("more rows than SGLang lets FlashInfer have")
        comm.allreduce_fusion(
            input=part, workspace=made, pattern=comm.AllReduceFusionPattern.kARResidualRMSNorm, launch_with_pdl=True,
            residual_in=residual, residual_out=torch.empty_like(residual), norm_out=torch.empty_like(part),
            rms_gamma=weight, rms_eps=EPS, fp32_acc=True, trigger_completion_at_end=False,
        )  # fmt: skip

    yield call


def microseconds(call: Call, rows: int, width: int, device: torch.device) -> float:
    """This rank's median of a call."""
    size = rows * width
    sets, calls = (8, 40) if size <= 2**21 else (2, 4)
    weight = torch.rand(width, device=device).bfloat16()
    given = [(*torch.randn(2, rows, width, device=device).bfloat16(), weight) for _ in range(sets)]
    for tensors in given[:2]:
        call(*tensors)
    torch.cuda.synchronize()
    dist.barrier()
    graph = torch.cuda.CUDAGraph()
    with getattr(call, "capturing", nullcontext)(), torch.cuda.graph(graph):
        for i in range(calls):
            call(*given[i % sets])
    dist.barrier()
    times = []
    for i in range(18):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        if i >= 3:
            times.append(1000 * begin.elapsed_time(end) / calls)
    return float(statistics.median(times))


def process(rank: int, args: argparse.Namespace) -> None:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    meet = f"file://{args.out}.meet"
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=meet, rank=rank, world_size=args.ranks, device_id=device)
    group = dist.group.WORLD
    assert group is not None
    found: dict[str, dict[str, float]] = {}
    said: dict[str, str] = {}
    contenders = {"ours": ours, "nccl": nccl, "vllm": vllm, "flashinfer": flashinfer}
    with settings.override(backend="triton", strict=True):
        for name in getattr(args, "with"):
            for lanes in args.lanes if name == "ours" else [None]:
                label = name if lanes is None else f"{name} {lanes}"
                begin = time.monotonic()
                try:
                    with contenders[name](group, device) as call, kernel.forced(lanes=lanes):
                        for width in args.widths:
                            for rows in args.rows:
                                try:
                                    took = torch.tensor(microseconds(call, rows, width, device))
                                except TooLarge as error:
                                    said[f"{label}, {rows} x {width}"] = str(error)
                                    continue
                                dist.all_reduce(took, op=dist.ReduceOp.MAX)
                                found.setdefault(f"{rows} x {width}", {})[label] = round(took.item(), 2)
                except Exception as error:
                    said[label] = f"{type(error).__name__}: {str(error)[:300]}"
                    print(traceback.format_exc()[-1500:], flush=True)
                if rank == 0:
                    print(f"{label}: {time.monotonic() - begin:.1f} s", flush=True)
    if rank == 0:
        for size, times in found.items():
            print(size, times, flush=True)
        about = {"date": date.today().isoformat(), "gpu": torch.cuda.get_device_name(device), "ranks": args.ranks,
                 "torch": torch.__version__, "microseconds": found, "not measured": said}  # fmt: skip
        Path(args.out).write_text(json.dumps(about, indent=1))
    dist.barrier()
    os._exit(0)


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--ranks", type=int, default=2)
    asked.add_argument("--out", default="/tmp/across_ranks.json")
    asked.add_argument("--with", nargs="+", default=["ours", "nccl", "vllm", "flashinfer"])
    asked.add_argument("--rows", nargs="+", type=int, default=ROWS)
    asked.add_argument("--widths", nargs="+", type=int, default=WIDTHS)
    asked.add_argument("--lanes", nargs="+", type=int, default=[None], help="ours with so many vectors a chunk")
    args = asked.parse_args()
    Path(f"{args.out}.meet").unlink(missing_ok=True)
    spawn(process, (args,), args.ranks)


if __name__ == "__main__":
    main()
