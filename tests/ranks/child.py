"""One rank of several, on memory that all of them share: random calls, each held against the native twin.

    TRITON_INTERPRET=1 RANK=0 SIZE=2 FOLDER=folder python -m tests.ranks.child SEED CALLS

Every rank makes the same calls. Between two accesses to memory a rank sleeps now and then, so that ranks meet in every
order. The sum and the residual are the twin's bit for bit. The norm is that of the same kernel on one rank, which is
given the twin's sum, bit for bit; and the twin's, but for the order in which squares are added.
"""

from __future__ import annotations

import os
import random
import sys
import time
from dataclasses import InitVar, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from norm_plugin import groups, ranks, settings
from norm_plugin.kernels import ranks as kernel
from norm_plugin.native import ranks as twin
from norm_plugin.native.rms import add_rmsnorm, rmsnorm
from norm_plugin.ranks import workspace
from norm_plugin.ranks.workspace import Workspace
from tests.kernels import interpreter

WIDTH = 320
CHANNELS = 3
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
NUMERICS = ["fp32", "hf", "vllm_c", "sgl_jit"]


def shared(name: str, rank: int, size: int, folder: Path) -> Workspace:
    """The workspace of a group whose memory lies in files of a folder."""
    row_bytes = 4 * WIDTH
    length = workspace.bytes_of(CHANNELS, size, row_bytes) // 4
    parts = [
        torch.from_file(str(folder / f"{name}.{q}"), shared=True, size=length, dtype=torch.int32) for q in range(size)
    ]
    parts[rank].fill_(workspace.EMPTY)
    status = torch.zeros(size, dtype=torch.int32)
    addresses = [*(p.data_ptr() for p in parts), status.data_ptr()]
    made = Workspace(
        name, rank, size, "", CHANNELS, row_bytes, torch.tensor(addresses), torch.zeros(CHANNELS, dtype=torch.int64)
    )
    made.status, made.memory = status, parts
    return workspace.enter(made)


def sleepy(chance: float, dice: random.Random) -> None:
    """Have each access to memory wait now and then."""
    from triton.runtime.interpreter import InterpreterBuilder

    for name in ("create_masked_load", "create_masked_store", "create_load", "create_store"):
        if (original := getattr(InterpreterBuilder, name, None)) is None:
            continue

        def slowed(self: Any, *args: Any, original: Any = original) -> Any:
            if dice.random() < chance:
                time.sleep(dice.random() / 100)
            return original(self, *args)

        setattr(InterpreterBuilder, name, slowed)


def numbers(dice: torch.Generator, call: Call) -> Tensor:
    """Numbers of all kinds: zeros of both signs, what vanishes when it is rounded, the largest of fp16, NaN."""
    x = torch.randn(call.rows, call.width, generator=dice)
    kinds = torch.randint(0, 12, (call.rows, call.width), generator=dice)
    for kind, value in enumerate([0.0, -0.0, -1e-9, -0.0, 65504.0]):
        x[kinds == kind] = value
    if torch.randint(0, 10, (), generator=dice) == 0:
        x[0, 0] = float("nan")
    return x.to(call.dtype)


def same(ours: Tensor, theirs: Tensor) -> bool:
    """The same bits, but for which NaN it is."""
    bits = {2: torch.int16, 4: torch.int32}[ours.element_size()]
    return bool(((ours.view(bits) == theirs.view(bits)) | (ours.isnan() & theirs.isnan())).all())


@dataclass
class Call:
    """One random call. All ranks draw the same from `dice`; only `part` is each rank's own."""

    number: int
    rank: int
    dice: InitVar[random.Random]

    def __post_init__(self, dice: random.Random) -> None:
        self.rows, self.width = dice.choice([1, 1, 2, 3, 4, 7]), dice.choice([8, 64, 136, WIDTH])
        self.dtype, self.op = dice.choice(DTYPES), dice.choice(["norm", "add", "sandwich"])
        self.how = {"eps": 1e-6, "numerics": dice.choice(NUMERICS), "gemma": dice.random() < 0.3}
        self.lanes, self.two_shot_bytes = dice.choice([None, 32]), dice.choice([0, 2**40])
        self.part = numbers(torch.Generator().manual_seed(1000 * self.number + self.rank), self)
        common = torch.Generator().manual_seed(self.number)
        self.residual = numbers(common, self).to(dice.choice([self.dtype, torch.float32]))
        self.weight, self.post = (torch.rand(self.width, generator=common).to(self.dtype) for _ in range(2))

    def ours(self, group: dist.ProcessGroup) -> tuple[Tensor, Tensor | None]:
        """By the kernel, on all ranks."""
        if self.op == "norm":
            return ranks.allreduce_rmsnorm(self.part, self.weight, group, **self.how), None
        if self.op == "add":
            return ranks.allreduce_add_rmsnorm(self.part, self.residual, self.weight, group, **self.how)
        return ranks.allreduce_norm_add_norm(self.part, self.residual, self.post, self.weight, group, **self.how)

    def alone(self, total: Tensor) -> tuple[Tensor, Tensor | None]:
        """By the kernel of one rank, which is given the sum."""
        how = (self.how["eps"], self.how["numerics"], self.how["gemma"], None)
        residual = None if self.op == "norm" else self.residual
        tensors = (total, residual, self.post if self.op == "sandwich" else None, self.weight)
        return kernel.bind(*tensors, "alone", *how).run(*tensors, self.how["eps"])

    def native(self, total: Tensor) -> tuple[Tensor, Tensor | None]:
        """By the native op of one rank, which is given the sum."""
        if self.op == "norm":
            return rmsnorm(total, self.weight, **self.how), None
        if self.op == "sandwich":
            total = rmsnorm(total, self.post, **self.how)
        return add_rmsnorm(total, self.residual, self.weight, **self.how)

    def check(self, total: Tensor, ours: tuple[Tensor, Tensor | None]) -> None:
        """Hold what the kernel said against the others."""
        alone, native = self.alone(total), self.native(total)
        assert same(ours[0], alone[0]), f"{self}: the norm is another than on one rank"
        if ours[1] is not None:
            assert same(ours[1], alone[1]), f"{self}: the residual is another than on one rank"
            if self.op == "add":
                assert same(ours[1], native[1]), f"{self}: the residual is not the twin's"
        near = torch.finfo(self.dtype).eps * (8 if self.op == "sandwich" else 2)
        close = torch.allclose(ours[0].double(), native[0].double(), rtol=near, atol=near, equal_nan=True)
        assert close, f"{self}: far from the twin"

    def __str__(self) -> str:
        how = f"{self.how}, lanes {self.lanes}, two shots from {self.two_shot_bytes} bytes"
        return f"call {self.number} of rank {self.rank}: {self.op} {self.rows} x {self.width} {self.dtype} {how}"


def main(rank: int, size: int, folder: Path, seed: int, count: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    group = dist.group.WORLD
    assert group is not None
    groups.enter(group)
    shared(group.group_name, rank, size, folder)
    (folder / f"alone{rank}").mkdir()
    shared("alone", 0, 1, folder / f"alone{rank}")
    dist.barrier()
    dice = random.Random(seed)
    calls = [Call(number, rank, dice) for number in range(count)]
    totals = [twin.allreduce(call.part, group.group_name) for call in calls]
    sleepy(0.02, random.Random(seed + rank))
    answers = []
    with interpreter.repaired(), settings.override(backend="triton", strict=True):
        for call in calls:  # nothing but the kernel keeps the ranks together here
            with kernel.forced(lanes=call.lanes, two_shot_bytes=call.two_shot_bytes):
                workspace.enter(workspace.find(group.group_name))  # binds anew
                answers.append(call.ours(group))
        for call, total, answer in zip(calls, totals, answers, strict=True):
            with kernel.forced(lanes=call.lanes, two_shot_bytes=call.two_shot_bytes):
                call.check(total, answer)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    here = int(os.environ["RANK"]), int(os.environ["SIZE"]), Path(os.environ["FOLDER"])
    main(*here, int(sys.argv[1]), int(sys.argv[2]))
