"""The ops across ranks on real GPUs, a process a rank: every call held against its twins, bit for bit.

    python -m tests.ranks.grid --ranks 2 [--part calls graphs order rounds killed] [--out FILE]

With more ranks than GPUs, some share one (TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES=1), which shows bits and no times.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from norm_plugin import ranks, settings
from norm_plugin.kernels import ranks as kernel
from norm_plugin.native import ranks as twin
from norm_plugin.native.rms import add_rmsnorm, rmsnorm
from norm_plugin.ranks import workspace
from norm_plugin.ranks.workspace import Workspace

ROWS = [1, 2, 7, 32, 33, 256, 2048, 8192]
WIDTHS = [1024, 2880, 4096, 5120, 7168, 8192, 16384]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
OPS = ["add", "norm", "sandwich"]
NUMERICS = ["fp32", "hf", "vllm_c", "sgl_jit"]
EPS = 1e-6
SECONDS = 10


class Rank:
    """What one process does."""

    def __init__(self, rank: int, size: int, group: dist.ProcessGroup, device: torch.device) -> None:
        self.rank, self.size, self.group, self.device = rank, size, group, device
        self.widths, self.dtypes, self.numerics = WIDTHS, DTYPES, NUMERICS
        self.failures: list[str] = []
        self.compared = 0

    def tensors(self, seed: int, rows: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(part of this rank, residual, post-norm's weight, weight)."""
        mine = torch.Generator(self.device).manual_seed(1000 * seed + self.rank)
        common = torch.Generator(self.device).manual_seed(seed)
        part = torch.randn(rows, width, generator=mine, device=self.device)
        part[:, ::7] = -0.0
        residual = torch.randn(rows, width, generator=common, device=self.device)
        post, weight = (torch.rand(width, generator=common, device=self.device) for _ in range(2))
        return part.to(dtype), residual.to(dtype), post.to(dtype), weight.to(dtype)

    def call(
        self, op: str, part: Tensor, residual: Tensor, post: Tensor, weight: Tensor, **how: Any
    ) -> tuple[Any, Any]:
        if op == "norm":
            return ranks.allreduce_rmsnorm(part, weight, self.group, EPS, **how), None
        if op == "add":
            return ranks.allreduce_add_rmsnorm(part, residual, weight, self.group, EPS, **how)
        return ranks.allreduce_norm_add_norm(part, residual, post, weight, self.group, EPS, **how)

    def check(self, said: str, ours: tuple[Any, Any], op: str, tensors: tuple[Tensor, ...], total: Tensor,
              numerics: str = "fp32", gemma: bool = False) -> None:  # fmt: skip
        """Hold an answer against the kernel of one rank and the native op, both of the twin's sum."""
        _, residual, post, weight = tensors
        given = (total, None if op == "norm" else residual, post if op == "sandwich" else None, weight)
        alone = kernel.bind(*given, "alone", EPS, numerics, gemma, None).run(*given, EPS)
        how = {"numerics": numerics, "gemma": gemma}
        if op == "norm":
            native = (rmsnorm(total, weight, EPS, **how), None)
        else:
            x = rmsnorm(total, post, EPS, **how) if op == "sandwich" else total
            native = add_rmsnorm(x, residual, weight, EPS, **how)
        bits = {2: torch.int16, 4: torch.int32}[total.element_size()]
        near = torch.finfo(total.dtype).eps * (8 if op == "sandwich" else 2)
        wrong = []
        if not torch.equal(ours[0].view(bits), alone[0].view(bits)):
            wrong.append("the norm is another than on one rank")
        if ours[1] is not None and not torch.equal(ours[1].view(bits), alone[1].view(bits)):
            wrong.append("the residual is another than on one rank")
        if op == "add" and not torch.equal(ours[1].view(bits), native[1].view(bits)):
            wrong.append("the residual is not the twin's")
        if not torch.allclose(ours[0].float(), native[0].float(), rtol=near, atol=near):
            wrong.append(f"the norm is {(ours[0].float() - native[0].float()).abs().max().item():.3g} off the twin")
        self.compared += 1
        self.failures += [f"rank {self.rank}: {said}: {w}" for w in wrong]

    def same(self, said: str, alone: tuple[Any, Any], of_many: tuple[Any, Any]) -> None:
        """Hold the first rows of an answer against those of a larger call."""
        for one, many in zip(alone, of_many, strict=True):
            if one is not None and not torch.equal(one.view(torch.uint8), many[: len(one)].view(torch.uint8)):
                self.failures.append(f"rank {self.rank}: {said}: it depends on the number of rows")

    # --- parts ----------------------------------------------------------------------------------------------------

    def calls(self) -> None:
        """Every op, dtype and size, by one shot and by two."""
        for seed, (rows, width, dtype, op) in enumerate(itertools.product(ROWS, self.widths, self.dtypes, OPS)):
            if rows * width > 2048 * 16384 and (op != "add" or dtype != torch.bfloat16):
                continue
            tensors = self.tensors(seed, rows, width, dtype)
            total = twin.allreduce(tensors[0], self.group.group_name)
            for limit in (0, 2**62):
                with kernel.forced(two_shot_bytes=limit):
                    workspace.enter(workspace.find(self.group.group_name))
                    ours = self.call(op, *tensors)
                    self.check(f"{op} {rows} x {width} {dtype} two shots {not limit}", ours, op, tensors, total)
            some = tuple(t[:1] if t.dim() > 1 else t for t in tensors)
            self.same(f"row 0 of {op} {rows} x {width} {dtype}", self.call(op, *some), ours)
        recipes = itertools.product(NUMERICS, [False, True], OPS)
        for seed, (numerics, gemma, op) in enumerate(recipes if "hf" in self.numerics else []):
            tensors = self.tensors(seed, 5, 4096, torch.bfloat16)
            total = twin.allreduce(tensors[0], self.group.group_name)
            ours = self.call(op, *tensors, numerics=numerics, gemma=gemma)
            self.check(f"{op} {numerics} gemma {gemma}", ours, op, tensors, total, numerics, gemma)

    def graphs(self) -> None:
        """A captured graph of several sizes, replayed with other numbers, with eager calls in between."""
        sizes = [(1, 4096), (256, 8192), (1, 2880), (33, 16384), (2048, 4096), (7, 1024)]
        static = [self.tensors(i, rows, width, torch.bfloat16) for i, (rows, width) in enumerate(sizes)]
        for t in static:
            self.call("add", *t)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            answers = [self.call("add", *t) for t in static]
        for again in range(20):
            for i, t in enumerate(static):
                for old, new in zip(t, self.tensors(100 * again + i, *t[0].shape, torch.bfloat16), strict=True):
                    old.copy_(new)
            totals = [twin.allreduce(t[0], self.group.group_name) for t in static]
            for _ in range(3):
                graph.replay()
            for size, t, total, answer in zip(sizes, static, totals, answers, strict=True):
                self.check(f"graph {size}, replay {again}", answer, "add", t, total)
            if again % 3 == 0:
                t = self.tensors(again, 3, 4096, torch.float16)
                total = twin.allreduce(t[0], self.group.group_name)
                self.check("between graphs", self.call("norm", *t), "norm", t, total)

    def order(self) -> None:
        """Random sizes one after the other, with nothing else that keeps the ranks together, and random delays."""
        dice, own = random.Random(7), random.Random(self.rank)
        chosen = [tuple(map(dice.choice, (ROWS[:-1], self.widths, self.dtypes, OPS))) for _ in range(200)]
        given = [self.tensors(i, rows, width, dtype) for i, (rows, width, dtype, _) in enumerate(chosen)]
        totals = [twin.allreduce(t[0], self.group.group_name) for t in given]
        for limit in (2**62, 2**16):
            with kernel.forced(two_shot_bytes=limit):
                workspace.enter(workspace.find(self.group.group_name))
                answers = []
                for (*_, op), t in zip(chosen, given, strict=True):
                    if own.random() < 0.2:
                        torch.cuda._sleep(own.randrange(200_000))
                    answers.append(self.call(op, *t))
                for i, ((*size, op), t, total, answer) in enumerate(zip(chosen, given, totals, answers, strict=True)):
                    self.check(f"in order {i}: {size} {op}", answer, op, t, total)

    def rounds(self, count: int = 100_000) -> None:
        """Many rounds of graphs of 100 calls, with random delays on random ranks."""
        sizes = [(1, 4096), (3, 2880), (17, 4096), (1, 8192), (64, 4096)] * 20
        given = [self.tensors(i, rows, width, torch.bfloat16) for i, (rows, width) in enumerate(sizes)]
        totals = [twin.allreduce(t[0], self.group.group_name) for t in given]
        own = random.Random(self.rank)
        for t in given[:5]:
            self.call("add", *t)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            answers = []
            for t in given:
                if own.random() < 0.1:
                    torch.cuda._sleep(own.randrange(20_000))
                answers.append(self.call("add", *t))
        for done in range(count // len(sizes)):
            if own.random() < 0.2:
                torch.cuda._sleep(own.randrange(200_000))
            graph.replay()
            if done % 200 == 199:
                for i, (t, total, answer) in enumerate(zip(given, totals, answers, strict=True)):
                    self.check(f"round {done} call {i}", answer, "add", t, total)

    def killed(self) -> None:
        """The last rank goes away. The others get an error, in bounded time, that names it."""
        tensors = self.tensors(0, 4, 4096, torch.bfloat16)
        self.call("add", *tensors)
        torch.cuda.synchronize()
        dist.barrier(self.group)
        if self.rank == self.size - 1:
            sys.stdout.flush()
            os._exit(0)
        begin = time.monotonic()
        try:
            self.call("add", *tensors)
            torch.cuda.synchronize()
            self.failures.append(f"rank {self.rank}: a call without rank {self.size - 1} ended")
        except RuntimeError as error:
            took = time.monotonic() - begin
            found = workspace.find(self.group.group_name)
            assert found.status is not None
            print(f"rank {self.rank}: after {took:.1f} s: {str(error).splitlines()[0]}; status {found.status.tolist()}")
            if found.status.tolist()[self.size - 1] != 1 or took > SECONDS + 10:
                self.failures.append(f"rank {self.rank}: {took} s, status {found.status.tolist()}")
            time.sleep(2)  # the watcher says it


def alone(device: torch.device) -> None:
    """A workspace of one rank, for comparisons."""
    row_bytes, channels = 4 * 16384, 2 * torch.cuda.get_device_properties(device).multi_processor_count
    made = Workspace("alone", 0, 1, "", channels, row_bytes)
    memory = torch.full((made.bytes // 4,), workspace.EMPTY, dtype=torch.int32, device=device)
    made.status = torch.zeros(1, dtype=torch.int32, pin_memory=True)
    made.peers = torch.tensor([memory.data_ptr(), made.status.data_ptr()], device=device)
    made.state, made.memory = torch.zeros(channels, dtype=torch.int64, device=device), memory
    workspace.enter(made)


def compile_all(shard: int, shards: int, size: int) -> None:
    """Compile a share of the kernels, which the ranks then find in Triton's cache."""
    device = torch.device("cuda", 0)
    made = Workspace("compiled", 0, size, "", 8, 4 * 16384)
    pointers = torch.zeros(64, dtype=torch.int64, device=device)
    every = [(w, d, op, "fp32", False) for w, d, op in itertools.product(WIDTHS, DTYPES, OPS)]
    every += [(4096, torch.bfloat16, op, n, g) for op, n, g in itertools.product(OPS, NUMERICS, [False, True])]
    for width, dtype, op, numerics, gemma in every[shard::shards]:
        x, weight = torch.zeros(1, width, dtype=dtype, device=device), torch.zeros(width, dtype=dtype, device=device)
        residual, post = None if op == "norm" else x, weight if op == "sandwich" else None
        for made.size, made.group in [(size, "compiled"), (1, "compiled")]:
            workspace.enter(made)
            bound = kernel.bind(x, residual, post, weight, "compiled", EPS, numerics, gemma, None)
            for launch in bound.launches[: 3 if made.size > 1 else 1]:
                arguments = (x, residual, post, weight, x, residual, pointers, pointers, 1, *launch.integers, EPS)
                launch.compile((1,), arguments, launch.constants | launch.options, True)


def process(rank: int, size: int, parts: list[str], out: str) -> None:
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    dist.init_process_group("gloo", init_method=f"file://{out}.meet", rank=rank, world_size=size)
    group = dist.group.WORLD
    assert group is not None
    made = ranks.prepare(group, width=16384, dtype=torch.float32, device=device, seconds=SECONDS)
    if made.reason:
        raise SystemExit(f"no workspace: {made.reason}")
    alone(device)
    one = Rank(rank, size, group, device)
    with settings.override(backend="triton", strict=True):
        for name in parts:
            begin = time.monotonic()
            part: Callable[[], None] = getattr(one, name)
            try:
                part()
                if name != "killed":  # which ends the context
                    torch.cuda.synchronize()
            except Exception:
                one.failures.append(f"rank {rank}: {name}: {traceback.format_exc()[-1500:]}")
                print(one.failures[-1], flush=True)
                break
            print(f"rank {rank}: {name}: {time.monotonic() - begin:.1f} s, {one.compared} compared, "
                  f"{len(one.failures)} failures {one.failures[:3]}", flush=True)  # fmt: skip
    result = {"rank": rank, "ranks": size, "gpus": torch.cuda.device_count(), "gpu": torch.cuda.get_device_name(device)
              if not one.failures else "", "torch": torch.__version__, "parts": parts, "compared": one.compared,
              "MiB": round(made.bytes / 2**20), "failures": one.failures[:20]}  # fmt: skip
    Path(f"{out}.{rank}").write_text(json.dumps(result))
    os._exit(1 if one.failures else 0)  # a context that has ended cannot be taken down


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--ranks", type=int, default=2)
    asked.add_argument("--part", nargs="+", default=["calls", "graphs", "order", "rounds", "killed"])
    asked.add_argument("--out", default="/tmp/ranks")
    asked.add_argument("--compilers", type=int, default=14, help="processes that compile first")
    args = asked.parse_args()
    if args.compilers:
        mp.spawn(compile_all, (args.compilers, args.ranks), args.compilers)
    Path(f"{args.out}.meet").unlink(missing_ok=True)
    started = mp.spawn(process, (args.ranks, args.part, args.out), args.ranks, join=False)
    while any(p.is_alive() for p in started.processes):
        time.sleep(0.2)
    written = [path for r in range(args.ranks) if (path := Path(f"{args.out}.{r}")).exists()]
    results = [json.loads(path.read_text()) for path in written]
    failures = [f for r in results for f in r["failures"]]
    print(json.dumps({"ranks": len(results), "compared": [r["compared"] for r in results], "failures": failures[:10]}))
    sys.exit(bool(failures) or not results)


if __name__ == "__main__":
    main()
