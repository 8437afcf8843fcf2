"""Compile everything that a part needs before it is timed: most of a run would be spent compiling one thing at a time.

Triton, Inductor and Quack find on disk what another process has compiled, so a few processes share that work.
FlashInfer keeps its kernels in the process: they are compiled in the one that measures, meanwhile.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO

import torch

from norm_plugin import settings
from norm_plugin.bench.buffers import Buffers
from norm_plugin.bench.grid import Point, points, same_kernels
from norm_plugin.bench.libraries import LIBRARIES, Library
from norm_plugin.bench.peers import ALONE_NAME, OUR_NAME, attempt, candidates

WORKERS = 12


def compile_points(group: list[Point], libraries: tuple[Library, ...], ours: bool) -> None:
    """Call everyone once at each of these points. Who fails here fails again where it is counted."""
    for point in group:
        buffers = Buffers(point)
        for peer in candidates(point, libraries):
            if ours or peer.name not in (OUR_NAME, ALONE_NAME):
                attempt(lambda peer=peer, buffers=buffers: peer.call(buffers)())  # type: ignore[misc]


@dataclass(frozen=True)
class Worker:
    """A process that compiles a share of a part, and what it prints."""

    process: subprocess.Popen[bytes]
    output: IO[bytes]

    def last_line(self) -> str:
        self.output.seek(0)
        lines = self.output.read().decode(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else "nothing was printed"


def start(part: str, ops: Sequence[str], quick: bool) -> list[Worker]:
    """Processes that fill the caches on disk."""
    workers = []
    environment = os.environ | {
        "FLA_CACHE_RESULTS": "0",  # they share the GPU, so what FLA's autotuner finds in them means nothing
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
    for share in range(WORKERS):
        command = [sys.executable, "-m", "norm_plugin.bench.precompile", part, str(share), ",".join(ops)]
        if quick:
            command.append("--quick")
        output = tempfile.TemporaryFile()  # noqa: SIM115, closed in `finish`
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        workers.append(Worker(process, output))
    return workers


def finish(workers: list[Worker], until: float) -> str:
    """Wait for them, but not beyond `until` (of time.monotonic); a line that says how it went."""
    begin = time.monotonic()
    late, failed = 0, []
    for worker in workers:
        try:
            if worker.process.wait(max(0.1, until - time.monotonic())):
                failed.append(worker.last_line())
        except subprocess.TimeoutExpired:
            late += 1
            worker.process.kill()
            worker.process.wait()
        worker.output.close()
    why = f" ({failed[0]})" if failed else ""
    waited = time.monotonic() - begin
    return f"{len(workers)} processes compiled ahead; waited {waited:.0f} s, {late} stopped, {len(failed)} failed{why}"


def main() -> None:
    parser = argparse.ArgumentParser(description="One share of compiling ahead; started by norm_plugin.bench.run.")
    parser.add_argument("part")
    parser.add_argument("share", type=int)
    parser.add_argument("ops")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    on_disk = tuple(library for library in LIBRARIES if library.kernels_on_disk)
    chosen = [point for point in points(options.part, options.quick) if point.op in options.ops.split(",")]
    with torch.no_grad(), settings.override(backend="triton", strict=True):
        for group in same_kernels(chosen)[options.share :: WORKERS]:
            compile_points(group, on_disk, ours=True)


if __name__ == "__main__":
    main()
