"""What the makers of both tables share: candidates are compiled together, measured, and grouped by table and width."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

WORKERS = 12


@dataclass(frozen=True)
class Candidate:
    """One entry of a table, for one width."""

    table: str
    width: int


C = TypeVar("C", bound=Candidate)


@dataclass(frozen=True)
class Measured(Generic[C]):
    """A candidate and its microseconds by number of rows."""

    candidate: C
    times: dict[int, float]


def compile_together(compile_all: Callable[[list[C]], None], every: Sequence[C]) -> None:
    """Fill Triton's cache in processes of their own: compiling takes most of the time."""
    with multiprocessing.get_context("spawn").Pool(WORKERS) as pool:
        pool.map(compile_all, [list(every[i :: WORKERS * 4]) for i in range(WORKERS * 4)], chunksize=1)


def grouped(measured: Iterable[Measured[C]]) -> list[tuple[tuple[str, int], list[Measured[C]]]]:
    """Those of each table and width, in order."""
    found: dict[tuple[str, int], list[Measured[C]]] = {}
    for m in measured:
        found.setdefault((m.candidate.table, m.candidate.width), []).append(m)
    return sorted(found.items(), key=lambda item: item[0])
