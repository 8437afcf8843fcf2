"""Who takes part at a point: ours and every library that can be imported, runs, and computes the same.

A library that does not is left out, and the reason is kept.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from norm_plugin.bench.backward import trained
from norm_plugin.bench.buffers import FP8, Buffers, Function
from norm_plugin.bench.grid import Point, compiled
from norm_plugin.bench.libraries import COMPILED, LIBRARIES, Functions, Library
from norm_plugin.bench.our_calls import ALONE, OURS
from norm_plugin.bench.timing import Call

OUR_NAME = "norm_plugin"
ALONE_NAME = "norm alone"

#: How far the root mean square of the difference may be from ours, relative: far more than any rounding, and far less
#: than another formula. An fp8 has a sixteenth of a step where a bf16 has one.
CLOSE, CLOSE_FP8 = 2e-2, 5e-2


@dataclass(frozen=True)
class Peer:
    """Someone's way to do an op."""

    name: str
    function: Function

    def call(self, buffers: Buffers) -> Call:
        """Does it on these buffers, and returns the output; with a backward, the outputs and all gradients."""
        if buffers.point.op.endswith("_backward"):
            return trained(self.function, buffers)
        return buffers.call(self.function)


@dataclass(frozen=True)
class LeftOut:
    """Who does not take part, and where ("" is everywhere)."""

    peer: str
    where: str
    reason: str


class Broken(RuntimeError):
    """The GPU answers nothing any more: whatever was measured until now has to be saved."""


def reason(error: BaseException) -> str:
    """One line of an exception."""
    return " ".join(traceback.format_exception_only(error)).strip().splitlines()[0][:300]


def attempt(what: Callable[[], Any]) -> tuple[Any, str]:
    """(the result, "") or (None, why there is none). Raises Broken if the GPU has not survived it."""
    try:
        result = what()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return result, ""
    except (Exception, SystemExit) as error:  # foreign code may raise anything
        why = reason(error)
    try:
        if torch.cuda.is_initialized():  # a capture that fails leaves its own stream behind as the current one
            torch.cuda.set_stream(torch.cuda.default_stream())
        torch.cuda.synchronize()
    except RuntimeError as error:
        raise Broken(f"{why}; then the GPU said {reason(error)}") from error
    return None, why


@cache
def loaded(library: Library) -> tuple[Functions, str]:
    """(the library's functions, "") or ({}, why it cannot be imported)."""
    try:
        return library.load(), ""
    except (Exception, SystemExit) as error:  # an import may fail in any way
        return {}, reason(error)


def unavailable(ops: set[str]) -> list[LeftOut]:
    """The libraries for these ops that cannot be imported."""
    wanted = [library for library in LIBRARIES if ops & set(library.ops)]
    return [LeftOut(library.name, "", loaded(library)[1]) for library in wanted if loaded(library)[1]]


def candidates(point: Point, libraries: tuple[Library, ...] = LIBRARIES) -> list[Peer]:
    """Ours first, then every loaded library that has the op."""
    found = [Peer(OUR_NAME, OURS[point.op])]
    for library in libraries:
        if point.op in library.ops and (library.name != COMPILED or compiled(point)):
            functions, _ = loaded(library)
            if point.op in functions:
                found.append(Peer(library.name, functions[point.op]))
    if point.op in ALONE:
        found.append(Peer(ALONE_NAME, ALONE[point.op]))
    return found


def difference(theirs: torch.Tensor, ours: torch.Tensor) -> float:
    """The root mean square of the difference, relative to that of ours."""
    return float((theirs - ours).norm() / ours.norm())


def apart(theirs: list[torch.Tensor], ours: list[torch.Tensor]) -> float:
    """The largest difference of any output; inf where there are not as many."""
    return max(map(difference, theirs, ours)) if len(theirs) == len(ours) else math.inf


def values(op: str, result: Any) -> list[torch.Tensor]:
    """What is compared of a call, in fp32: its first output, times its scales where that is quantised; with a backward
    the outputs and all gradients."""
    if op.endswith("_backward"):
        return [t.float() for t in result]
    if not isinstance(result, tuple):
        return [result.float()]
    y = result[0].float()
    if result[0].dtype != FP8:
        return [y]
    scales = result[1]
    return [(y.unflatten(-1, (scales.shape[-1], -1)) * scales.unsqueeze(-1)).flatten(-2)]


def checked(point: Point, peers: list[Peer], buffers: Buffers) -> tuple[list[Peer], list[LeftOut]]:
    """The peers whose output is ours, and the others. Each is run once, which also compiles it."""
    taken: list[Peer] = []
    left: list[LeftOut] = []
    ours: list[torch.Tensor] | None = None
    for peer in peers:
        result, why = attempt(lambda peer=peer: values(point.op, peer.call(buffers)()))  # type: ignore[misc]
        if not why and peer.name == OUR_NAME:
            ours = result
        elif not why and peer.name != ALONE_NAME and ours is not None:
            limit = CLOSE_FP8 if "quant" in point.op else CLOSE
            off = apart(result, ours)
            if not off < limit:  # NaN, too
                why = f"computes something else: off by {off:.2g} of ours"
        if why:
            left.append(LeftOut(peer.name, point.label, why))
        else:
            taken.append(peer)
    return taken, left
