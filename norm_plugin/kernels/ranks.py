"""The ops across ranks on their kernel: which calls it refuses, and how it is launched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from norm_plugin.kernels import Bound, Kernel, Refusal
from norm_plugin.kernels.binding import refuse_strange, roundings
from norm_plugin.kernels.constants import Tile
from norm_plugin.kernels.launch import KernelLaunch, processors, raw_stream, use_pdl
from norm_plugin.kernels.ranks_kernel import Exchange, ranks_kernel
from norm_plugin.kernels.rms_kernel import NO_QUANT, Recipe
from norm_plugin.native.rms import new_output
from norm_plugin.numerics import NUMERICS
from norm_plugin.ranks import workspace as workspaces
from norm_plugin.ranks.workspace import VECTOR, Workspace

#: Of few rows, each is held by many threads, so that it is through soon; of more, by a quarter as many, so that more
#: rows are under way. FEW is the number of rows for each multiprocessor; the others are of the vectors of a chunk.
FEW, MOST_LANES, LEAST_LANES = 2, 512, 128

#: From how many bytes of all rows on a group of so many ranks takes two shots.
TWO_SHOT_BYTES = {3: 2**20, 4: 2**19, 5: 2**18, 6: 2**18, 7: 2**18, 8: 2**17}

#: The most words that a thread waits for at once.
WORDS_AT_ONCE = 32

_forced: dict[str, Any] = {}


@contextmanager
def forced(**choices: Any) -> Iterator[None]:
    """Other choices (lanes, two_shot_bytes) for everything that is bound meanwhile: for whoever measures or tests
    them."""
    _forced.update(choices)
    try:
        yield
    finally:
        _forced.clear()


def lanes_of(vectors: int, many: bool) -> int:
    """The vectors of a chunk. No bit depends on it."""
    power = 1 << (vectors - 1).bit_length()
    return _forced.get("lanes") or max(LEAST_LANES, min(MOST_LANES, power // 4 if many else power))


def two_shot_rows(workspace: Workspace, row_bytes: int) -> int:
    """From how many rows on two shots are faster."""
    limit = _forced.get("two_shot_bytes")
    if limit is None:
        limit = TWO_SHOT_BYTES.get(workspace.size, 2**62 if workspace.size < 3 else 2**17)
    return -(-limit // row_bytes)


def launches(
    workspace: Workspace, input: Tensor, others: list[Tensor | None], recipe: Recipe, pdl: bool | None
) -> tuple[KernelLaunch, KernelLaunch, KernelLaunch]:
    """The launches of few rows, of many, and of many in two shots."""
    width, itemsize = input.shape[-1], input.element_size()
    row_bytes = width * itemsize
    refuse_strange(input, *others)
    if row_bytes % VECTOR:
        raise Refusal(f"rows of {width} {input.dtype} are no whole number of vectors of {VECTOR} bytes")
    if row_bytes > workspace.row_bytes:
        raise Refusal(f"a row takes {row_bytes} bytes, and ranks.prepare made room for {workspace.row_bytes}")
    with_pdl = use_pdl(pdl, input.device)

    def launch(many: bool, two_shot: bool) -> KernelLaunch:
        lanes = lanes_of(row_bytes // VECTOR, many)
        chunks = -(-row_bytes // (VECTOR * lanes))
        tile = Tile(
            n=width, block=lanes * VECTOR // itemsize, chunks=chunks, unroll=1, held=chunks, with_row=True, rows=1,
            levels=1, align=16, pdl=with_pdl, late=True,
        )  # fmt: skip
        at_once = max(1, WORDS_AT_ONCE // 4 // workspace.size)
        exchange = Exchange(workspace.size, two_shot, lanes, min(at_once, chunks), workspace.seconds)
        constants = {"tile": tile, "recipe": recipe, "exchange": exchange}
        integers = (workspace.rank, workspace.channels, workspace.row_bytes)
        channels = workspace.channels
        made = KernelLaunch(
            ranks_kernel, lanes // 32, integers, input.device, with_pdl, constants, lambda m: min(m, channels)
        )
        made.options["enable_fp_fusion"] = False  # a fused product is rounded otherwise: lanes would change bits
        return made

    return launch(False, False), launch(True, False), launch(True, True)


def bind(
    input: Tensor, residual: Tensor | None, post_weight: Tensor | None, weight: Tensor | None, group: str, eps: float,
    numerics: str, gemma: bool, pdl: bool | None,
) -> Bound:  # fmt: skip
    """What runs a signature. With post_weight, the sum is normalized before it is added."""
    workspace = workspaces.find(group)
    recipe = Recipe(
        gemma=gemma, l2=False, quant=NO_QUANT, group=1, qmax=1.0, min_scale=1.0, fp8_unit=False,
        **roundings(Recipe, NUMERICS[numerics]),
    )  # fmt: skip
    few, many, two_shots = launches(workspace, input, [residual, post_weight, weight], recipe, pdl)
    width = input.shape[-1]
    most_few, least_two = FEW * processors(input.device), two_shot_rows(workspace, width * input.element_size())

    def run(input: Tensor, residual: Tensor | None, post_weight: Tensor | None, weight: Tensor | None,
            eps: float) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        rows = input.numel() // width
        out, total = new_output(input), None if residual is None else new_output(residual)
        old = None if residual is None else packed(residual)
        in_order(workspace, input.device)
        launch = two_shots if rows >= least_two else many if rows > most_few else few
        launch(rows, eps, packed(input), old, post_weight, weight, out, total, workspace.peers, workspace.state)
        return out, total

    return Bound(run, (few, many, two_shots))


def packed(t: Tensor) -> Tensor:
    """t without gaps, at an address that vectors can be read from."""
    t = t.contiguous()
    return t if t.data_ptr() % VECTOR == 0 else t.clone()


def in_order(workspace: Workspace, device: torch.device) -> None:
    """Eager calls of one group run one after the other, whatever stream each of them is on."""
    if device.type != "cuda":
        return
    stream = raw_stream(device.index)
    if stream == workspace.last_stream or torch.cuda.is_current_stream_capturing():
        return
    if workspace.last_stream >= 0:
        last = torch.cuda.ExternalStream(workspace.last_stream, device=device)
        torch.cuda.current_stream(device).wait_stream(last)
    workspace.last_stream = stream


def bind_allreduce_rmsnorm(
    input: Tensor, weight: Tensor | None, group: str, eps: float, numerics: str, gemma: bool, enable_pdl: bool | None
) -> Bound:  # fmt: skip
    bound = bind(input, None, None, weight, group, eps, numerics, gemma, enable_pdl)
    return Bound(lambda input, weight, group, eps, *_: bound.run(input, None, None, weight, eps)[0], bound.launches)


def bind_allreduce_add_rmsnorm(
    input: Tensor, residual: Tensor, weight: Tensor | None, group: str, eps: float, numerics: str, gemma: bool,
    enable_pdl: bool | None,
) -> Bound:  # fmt: skip
    bound = bind(input, residual, None, weight, group, eps, numerics, gemma, enable_pdl)
    return Bound(
        lambda input, residual, weight, group, eps, *_: bound.run(input, residual, None, weight, eps), bound.launches
    )


def bind_allreduce_norm_add_norm(
    input: Tensor, residual: Tensor, post_weight: Tensor, weight: Tensor | None, group: str, eps: float,
    numerics: str, gemma: bool, enable_pdl: bool | None,
) -> Bound:  # fmt: skip
    bound = bind(input, residual, post_weight, weight, group, eps, numerics, gemma, enable_pdl)
    return Bound(
        lambda input, residual, post, weight, group, eps, *_: bound.run(input, residual, post, weight, eps),
        bound.launches,
    )


KERNELS: dict[str, Kernel] = {
    "allreduce_rmsnorm": bind_allreduce_rmsnorm,
    "allreduce_add_rmsnorm": bind_allreduce_add_rmsnorm,
    "allreduce_norm_add_norm": bind_allreduce_norm_add_norm,
}
