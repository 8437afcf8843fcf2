"""A real engine on a GPU, stock against patched: tokens a second of decoding, and milliseconds to the first token.

    PYTHONPATH=<the engine and what it needs>:. python -m benchmarks.speed vllm|sglang [--json FILE] ...

The engines of both sides are there at once and take turns, and only one works at a time. The median of --repeats
counts, each the fastest of --shots: what else a host does only ever makes one slower. With --processes 3 a side has
three engines: each tunes what it compiles for itself, so that stock is not as fast as stock. Nothing else may run on
the GPU meanwhile. `--device cpu --models tiny:llama` is a rehearsal, and says nothing about speed.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from benchmarks import engines, lab, models
from benchmarks.engines import Engine, prompts
from benchmarks.lab import SIDES, Lab

Pair = dict[str, Engine]
FEW = 8


def shots(pair: Pair, number: int, shot: Callable[[Engine], Any]) -> dict[str, list[Any]]:
    """What each side takes, several times; neither is always the first."""
    taken: dict[str, list[Any]] = {side: [] for side in SIDES}
    for i in range(number):
        for side in SIDES if i % 2 == 0 else SIDES[::-1]:
            taken[side].append(shot(pair[side]))
    return taken


def tokens_a_second(pair: Pair, number: int, batch: int, steps: int) -> dict[str, float]:
    """Of the steps that a long answer has more than a short one: the fastest long answer less the fastest short one.
    (The fastest difference would be that of a short answer that took too long.)"""
    asked = prompts(batch, 32)
    found = {}
    for side, taken in shots(pair, number, lambda e: (e.seconds(asked, FEW), e.seconds(asked, FEW + steps))).items():
        short, long = zip(*taken, strict=True)
        found[side] = batch * steps / (min(long) - min(short))
    return found


def first_token(pair: Pair, number: int, count: int, length: int) -> dict[str, float]:
    """Milliseconds."""
    asked = prompts(count, length)
    return {side: 1000 * min(taken) for side, taken in shots(pair, number, lambda e: e.seconds(asked, 1)).items()}


def measure(here: Lab, model: str, mode: str) -> dict[str, Any]:
    o = here.options
    batches, prefills = (o.batch, o.prefill) if here.cuda else ([1, 2], ["1x32"])
    steps = o.tokens if here.cuda else 4
    with ExitStack() as stack:
        pairs: list[Pair] = [{} for _ in range(o.processes)]
        for pair in pairs:
            for side in SIDES:
                engine = here.engine(model, mode, side, max(batches), 2048)
                pair[side] = stack.enter_context(engine)
        for pair in pairs:
            for engine in pair.values():
                engine.ready()
                for batch in batches:  # what is compiled at the first use
                    engine.seconds(prompts(batch, 32), FEW)
        found: dict[str, dict[str, Any]] = {"decode": {}, "prefill": {}}
        for _ in range(o.repeats):
            for pair in pairs:
                for batch in batches:
                    add(found["decode"], str(batch), tokens_a_second(pair, o.shots, batch, steps))
                for size in prefills:
                    add(found["prefill"], size, first_token(pair, o.shots, *map(int, size.split("x"))))
        for what, sizes in found.items():
            for sides in sizes.values():
                stock, ours = (statistics.median(sides[side]) for side in SIDES)
                sides["ratio"] = ours / stock if what == "decode" else stock / ours
        patched = pairs[0]["patched"].end()
    how = {"steps": steps, "processes": o.processes, "shots": o.shots}
    return {**how, **found, "version": patched.version, "calls": engines.calls(patched)}


def add(found: dict[str, Any], size: str, one: dict[str, float]) -> None:
    for side, number in one.items():
        found.setdefault(size, {}).setdefault(side, []).append(number)


def parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments of everything that measures speed."""
    found = lab.parser(description)
    found.add_argument("--batch", type=int, nargs="+", default=[1, 8, 16, 32, 64], metavar="N")
    found.add_argument("--prefill", nargs="*", default=["1x32", "1x512", "8x1024"], metavar="PROMPTSxTOKENS")
    found.add_argument("--tokens", type=int, default=128, metavar="N", help="of a long answer more than of a short one")
    found.add_argument("--repeats", type=int, default=3, metavar="N")
    found.add_argument("--processes", type=int, default=1, metavar="N", help="of each side")
    found.add_argument("--shots", type=int, default=4, metavar="N")
    return found


if __name__ == "__main__":
    options = parser(__doc__).parse_args()
    default = {"vllm": models.WIDTHS, "sglang": ["qwen3-0.6b"]}[options.engine]
    Lab("speed", options).run(measure, default)
