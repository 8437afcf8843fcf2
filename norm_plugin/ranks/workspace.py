"""The memory through which ranks give each other rows: one workspace a group, made before any capture.

It is torch's symmetric memory: each rank's part is mapped into all others. No NVLink multicast is used.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from norm_plugin import dispatch, groups, kernels

log = logging.getLogger("norm_plugin")

#: The buffers of a channel, which take turns, and the word of 32 bits that says that none has come: kernels/words.py.
BUFFERS, EMPTY = 3, -(2**31)

#: Channels for each multiprocessor. Programs start in the order of their numbers on every rank, so none waits for one
#: that cannot start.
CHANNELS = 4

#: How long a kernel waits for a rank, unless it is said otherwise: as long as NCCL does.
MOST_SECONDS = 600

#: Rows are sent in vectors of this many bytes.
VECTOR = 16


@dataclass(eq=False)
class Workspace:
    """A group's memory in this process, or the reason why there is none.

    `peers`: the address of each rank's memory, in the order of the ranks, and then that of `status`, where a kernel
    says for which ranks it has waited in vain. `state`: where each channel stands.
    """

    group: str
    rank: int
    size: int
    reason: str = ""
    channels: int = 0
    row_bytes: int = 0
    peers: Tensor | None = None
    state: Tensor | None = None
    status: Tensor | None = None
    memory: Any = None
    freed: bool = False
    last_stream: int = field(default=-1)
    seconds: int = MOST_SECONDS

    @property
    def bytes(self) -> int:
        """What it takes of this rank's memory."""
        return bytes_of(self.channels, self.size, self.row_bytes)


_workspaces: dict[str, Workspace] = {}


def bytes_of(channels: int, size: int, row_bytes: int) -> int:
    """What a workspace takes."""
    return BUFFERS * channels * (size + 1) * row_bytes  # a slot for each rank, and one for the sum


def find(group: str) -> Workspace:
    """The workspace of a group; raises Refusal where there is none."""
    found = _workspaces.get(group)
    if found is None or found.reason:
        raise kernels.Refusal(found.reason if found else "norm_plugin.ranks.prepare was not called for the group")
    return found


def enter(workspace: Workspace) -> Workspace:
    """Have the calls of its group use this workspace."""
    _workspaces[workspace.group] = workspace
    dispatch.start_over()  # the routes hold the workspace before
    return workspace


def prepare(
    group: ProcessGroup, *, width: int, dtype: torch.dtype, device: torch.device, seconds: int = MOST_SECONDS
) -> Workspace:
    """Make the memory for rows of up to `width` numbers of this dtype. Every rank of the group must call it, before a
    CUDA graph is captured. Where it cannot be had, `reason` of the result says why, and calls run natively.

    `seconds`: how long a kernel waits for a rank. A rank may compile for minutes at the begin while others wait."""
    name = groups.enter(group)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    device = torch.empty(0, device=device).device  # with its index
    row_bytes = -(-width * dtype.itemsize // VECTOR) * VECTOR
    channels = CHANNELS * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0
    here = (why_not(device, size), socket.gethostname(), (channels, row_bytes))
    reasons, hosts, sizes = zip(*of_all_ranks(here, group), strict=True)
    reason = first_reason(reasons)
    if not reason and len(set(hosts)) > 1:
        reason = "the group spans several hosts"
    if not reason and len(set(sizes)) > 1:
        reason = f"ranks differ in their multiprocessors or in the rows that they ask for: {sizes}"
    if reason:
        return enter(Workspace(name, rank, size, reason))
    return enter(made(Workspace(name, rank, size, "", channels, row_bytes, seconds=seconds), group, device))


def of_all_ranks(here: Any, group: ProcessGroup) -> list[Any]:
    """What each rank says, on all of them: either all have the memory, or none."""
    everywhere: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everywhere, here, group=group)
    return everywhere


def first_reason(reasons: Sequence[str]) -> str:
    """The reason of the first rank that has one."""
    return next((f"rank {rank}: {reason}" for rank, reason in enumerate(reasons) if reason), "")


def why_not(device: torch.device, size: int) -> str:
    """Why this process can have no workspace, or ''."""
    if size == 1:
        return "the group has one rank"
    if device.type != "cuda" or torch.version.hip is not None:
        return f"symmetric memory needs CUDA, and the tensors are on {device.type}"
    others = [i for i in range(torch.cuda.device_count()) if i != device.index]
    if not all(torch.cuda.can_device_access_peer(device, other) for other in others):
        return "a GPU cannot reach the memory of another (no peer access)"
    return kernels.unavailable(device)


def made(workspace: Workspace, group: ProcessGroup, device: torch.device) -> Workspace:
    """The workspace with its memory, empty on all ranks; with a reason, where one of them failed."""
    from torch.distributed import _symmetric_memory as symmetric

    words, channels = workspace.bytes // 4, workspace.channels
    memory: Any = None
    handle: Any = None

    def allocate() -> None:
        nonlocal memory
        memory = symmetric.empty(words + 2 * (channels + workspace.size + 1), dtype=torch.int32, device=device)

    def meet() -> None:
        nonlocal handle
        handle = symmetric.rendezvous(memory, group)

    def fill() -> None:
        workspace.status = torch.zeros(workspace.size, dtype=torch.int32, pin_memory=True)
        # in this memory, not in the engine's: vLLM's sleep mode would take that away
        workspace.state, workspace.peers = memory[words:].view(torch.int64).split([channels, workspace.size + 1])
        workspace.peers.copy_(torch.tensor([*handle.buffer_ptrs, workspace.status.data_ptr()]))
        workspace.state.zero_()
        memory[:words].fill_(EMPTY)
        workspace.memory = (memory, handle)
        torch.cuda.synchronize(device)

    for step in (allocate, meet, fill):  # a rank that fails says so before the others wait for it
        failed = ""
        try:
            with without_multicast():
                step()
        except (RuntimeError, ValueError) as error:
            failed = f"symmetric memory failed: {str(error).strip().splitlines()[0]}"
        workspace.reason = first_reason(of_all_ranks(failed, group))
        if workspace.reason:
            return workspace
    watch(workspace)
    log.info("norm_plugin: %.0f MiB for norms across %d ranks", workspace.bytes / 2**20, workspace.size)
    return workspace


@contextmanager
def without_multicast() -> Iterator[None]:
    """torch makes an NVLink multicast object where a GPU has them, unless this variable is set. None is needed here."""
    name = "TORCH_SYMM_MEM_DISABLE_MULTICAST"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def free(group: ProcessGroup) -> None:
    """Give the memory back. Every rank must call it, after its last call."""
    if found := _workspaces.pop(group.group_name, None):
        if found.peers is not None and found.peers.is_cuda:
            torch.cuda.synchronize(found.peers.device)
        found.freed, found.memory, found.peers, found.state = True, None, None, None
        dispatch.start_over()
    groups.leave(group.group_name)


def watch(workspace: Workspace, say: Callable[[str], None] = log.error) -> None:
    """Say which ranks a kernel has waited for in vain: the CUDA error that follows cannot."""

    def look() -> None:
        status = workspace.status
        while status is not None and not workspace.freed:
            if late := [i for i, waited in enumerate(status.tolist()) if waited]:
                say(
                    f"norm_plugin: rank {workspace.rank} of {workspace.size} has ended its CUDA context: in an "
                    f"all-reduce with a norm, rank {', '.join(map(str, late))} did not come in {workspace.seconds} s."
                )
                return
            stop.wait(1)

    stop = threading.Event()
    threading.Thread(target=look, name="norm_plugin watches ranks", daemon=True).start()
