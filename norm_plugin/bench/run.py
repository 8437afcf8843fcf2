"""Times ours and every peer at every point of a part, on the same buffers, in one process, and writes JSON.

At a point the contenders take turns, A B C A B C, so that a drift of clocks or heat meets all of them. Of a contender's
rounds the least median counts, since whatever disturbs a replayed graph only makes it slower.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from norm_plugin import settings
from norm_plugin.bench import arguments, precompile, summary
from norm_plugin.bench import results as stored
from norm_plugin.bench.buffers import Buffers
from norm_plugin.bench.grid import COLD_BYTES, COMPILED_NOTE, PARTS, Point, points, same_kernels, warm_buffers
from norm_plugin.bench.host import host_costs, memory
from norm_plugin.bench.libraries import LIBRARIES
from norm_plugin.bench.lower_bounds import Copy, best_copy, floor
from norm_plugin.bench.peers import Broken, LeftOut, Peer, attempt, candidates, checked, unavailable
from norm_plugin.bench.results import Results
from norm_plugin.bench.timing import Call, Time, graph_time

ROUNDS = 2
LARGE = 16 << 20
SAVE_EVERY = 15.0


def buffer_count(point: Point) -> int:
    """Few enough to stay in the L2 where that is meant, and larger than it together where it is not."""
    if point.part == "cold" or (point.part != "decode" and point.traffic >= LARGE):
        return max(3, -(-COLD_BYTES // point.traffic))
    return warm_buffers(point.traffic)


def repetitions(point: Point) -> tuple[int, int]:
    """(replays, launches in a graph): a replay takes a tenth of a millisecond or more."""
    if point.part == "cold":
        return 9, buffer_count(point)
    if point.traffic >= LARGE:
        return 15, min(64, max(6, (1 << 30) // point.traffic))
    return 25, 64


def held(calls: Sequence[Call]) -> list[Call]:
    """The calls, each keeping its last output. Else those that allocate would write where their last output was, which
    the L2 still holds, and those that are given `out` would not."""
    kept: list[object] = [None] * len(calls)

    def keeping(i: int, call: Call) -> Call:
        return lambda: kept.__setitem__(i, call())

    return [keeping(i, call) for i, call in enumerate(calls)]


def measure(point: Point, peers: Sequence[Peer], sets: Sequence[Buffers]) -> tuple[dict[str, Any], list[LeftOut]]:
    """Name -> median, spread and the medians of all rounds."""
    replays, launches = repetitions(point)
    rounds: dict[str, list[Time]] = {}
    left: list[LeftOut] = []
    calls = {peer.name: [peer.call(buffers) for buffers in sets] for peer in peers}
    for _ in range(ROUNDS):
        for name in list(calls):
            found, why = attempt(lambda name=name: graph_time(held(calls[name]), replays, launches))  # type: ignore[misc]
            if why:
                left.append(LeftOut(name, point.label, f"in a CUDA graph: {why}"))
                del calls[name]
            else:
                rounds.setdefault(name, []).append(found)
    times = {}
    for name in calls:
        best = min(rounds[name], key=lambda found: found.median)
        times[name] = {**asdict(best), "rounds": [found.median for found in rounds[name]]}
    return times, left


def by_turns(every: Sequence[Point]) -> list[list[Point]]:
    """Groups of points that share kernels, the ops in turn: a run that is cut short has some of each."""
    turn: dict[str, int] = {}
    keyed = []
    for group in same_kernels(list(every)):
        op = group[0].op
        turn[op] = turn.get(op, -1) + 1
        keyed.append((turn[op], group))
    return [group for _, group in sorted(keyed, key=lambda entry: entry[0])]


class Run:
    """One part: what was found until now, and until when points may be started."""

    def __init__(self, part: str, path: Path, seconds: float) -> None:
        self.part, self.path = part, path
        self.begin = time.monotonic()
        self.until = self.begin + seconds
        self.before = stored.load(path) if path.exists() else stored.empty()
        self.new: Results = stored.empty()
        self.saved = self.begin
        self.copies: dict[int, Copy] = {}

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.begin:5.0f} s] {self.part}: {text}", file=sys.stderr, flush=True)

    def left_out(self, left: Sequence[LeftOut]) -> None:
        for entry in left:
            self.say(f"without {entry.peer} {entry.where}: {entry.reason}")
        self.new["left_out"] += [{"part": self.part, **asdict(entry)} for entry in left]

    def results(self) -> Results:
        return stored.merged(self.before, self.new)

    def save(self) -> None:
        self.new["runs"][self.part]["seconds"] = round(time.monotonic() - self.begin, 1)
        self.new["runs"][self.part]["copies"] = [asdict(copy) for copy in self.copies.values()]
        stored.save(self.path, self.results())
        self.saved = time.monotonic()

    def copy(self, point: Point) -> float | None:
        """The microseconds of a copy of as many bytes, where that is what limits."""
        if self.part != "large":
            return None
        if point.traffic not in self.copies:
            self.copies[point.traffic] = best_copy(point.traffic)
        return self.copies[point.traffic].median

    def start(self) -> None:
        """What belongs to the run as a whole."""
        date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        self.new["runs"][self.part] = {
            "date": date,
            **stored.machine(),
            "floor": asdict(floor()),
            "torch.compile": COMPILED_NOTE,
        }

    def point(self, point: Point) -> None:
        copy = self.copy(point)
        first = Buffers(point)
        peers, left = checked(point, candidates(point), first)
        sets = [first, *(Buffers(point) for _ in range(buffer_count(point) - 1))]
        times, failed = measure(point, peers, sets)
        self.left_out([*left, *failed])
        entry = {**asdict(point), "label": point.label, "traffic": point.traffic, "copy_us": copy, "times": times}
        self.new["points"].append(entry)

    def points(self, every: Sequence[Point]) -> None:
        waiting = [point for group in by_turns(every) for point in group]
        for done, point in enumerate(waiting):
            if time.monotonic() > self.until:
                self.new["not_measured"] = [{"part": p.part, "label": p.label} for p in waiting[done:]]
                self.say(f"no time left: {len(waiting) - done} of {len(waiting)} points are not measured")
                return
            self.point(point)
            if time.monotonic() - self.saved > SAVE_EVERY:
                self.say(f"{done + 1} of {len(waiting)} points")
                self.save()


def compile_ahead(run: Run, every: Sequence[Point], quick: bool) -> None:
    """Other processes compile what is kept on disk; this one compiles the rest meanwhile."""
    ops = sorted({point.op for point in every})
    workers = precompile.start(run.part, ops, quick)
    run.left_out(unavailable(set(ops)))
    run.say("libraries imported")
    here = tuple(library for library in LIBRARIES if not library.kernels_on_disk)
    half = run.begin + (run.until - run.begin) / 2
    for group in same_kernels(list(every)):
        if time.monotonic() < half:
            precompile.compile_points(group[:1], here, ours=False)
    run.say("kernels of this process compiled")
    run.say(precompile.finish(workers, half))


def run_part(part: str, path: Path, seconds: float, quick: bool, ops: Sequence[str]) -> Results:
    """Measure one part, and write it to `path`, merged with what is there."""
    run = Run(part, path, seconds)
    every = [point for point in points(part, quick) if not ops or point.op in ops]
    with torch.no_grad(), settings.override(backend="triton", strict=True):
        run.start()
        try:
            if part == "host":
                costs, left = host_costs()
                run.new["host"], run.new["memory"] = costs, memory()
                run.left_out(left)
            else:
                compile_ahead(run, every, quick)
                gc.freeze()  # a capture may collect garbage, and the libraries brought much that is none
                run.start()  # now the libraries are imported, and know their versions; the GPU is awake
                run.points(every)
        except Broken as broken:
            run.left_out([LeftOut("the run", part, str(broken))])
        run.save()
    return run.results()


def bench(options: argparse.Namespace) -> Results:
    """Measure what the options ask for; everything that the file holds then."""
    found = stored.empty()
    for part in (options.part,) if options.part else PARTS:
        found = run_part(part, options.json, options.seconds, options.quick, options.ops)
    return found


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m norm_plugin.bench.run", description=arguments.DESCRIPTION)
    arguments.add(parser)
    options = parser.parse_args(given)
    if not torch.cuda.is_available():
        print(f"{parser.prog}: there is no GPU here that torch can use.", file=sys.stderr)
        sys.exit(2)
    print("\n".join(summary.lines(bench(options))))


if __name__ == "__main__":
    main()
