"""Times the native ops on this CPU, eager and compiled, against torch.nn.functional and the plain formula.

The contenders of one op take turns, in another order every round, and every ratio is one within a round. The plain
formula is timed twice in every round: the ratio of the two is the noise, and a smaller difference counts as none. It is
one thread's own CPU time that is taken, to which other programs add little.
"""

from __future__ import annotations

import argparse
import math
import platform
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch._inductor.exc import InductorError

from benchmarks import records
from benchmarks.cpu_formulas import SUBJECTS, Subject
from norm_plugin import dispatch, settings
from norm_plugin.bench.tables import table
from norm_plugin.native.compiled import compiled

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ROUNDS = 61
SECONDS_A_SAMPLE = 4e-3

#: The two that the bar compares, the second timing of one of them, and the same with torch.compile's own defaults.
NATIVE, PLAIN, AGAIN, DEFAULTS = "native compiled", "plain compiled", "plain compiled again", "plain, default compile"
PUBLIC = "public call compiled"
RATIOS = ("ratio", "ratio_error", "noise")


def verdict(ratio: float, error: float, noise: float) -> str:
    """Of the median ratio, native over plain, its standard error, and what two timings of one function differ by."""
    return "as fast" if ratio <= 1 else "within noise" if ratio - 2 * error - 1 <= noise else "slower"


def contenders(subject: Subject) -> dict[str, Callable[..., Any]]:
    """Everything that is timed, all called with the same arguments and compiled with the same settings."""
    plain = compiled(subject.plain, subject.written)
    return {
        NATIVE: compiled(subject.native, subject.written),
        PLAIN: plain,
        AGAIN: plain,
        DEFAULTS: torch.compile(subject.plain),
        "functional compiled": compiled(subject.functional, subject.written),
        "native": subject.native,
        "plain": subject.plain,
        "functional": subject.functional,
        PUBLIC: subject.public,
    }


def sample(call: Callable[..., Any], arguments: tuple[Any, ...], times: int) -> float:
    """Microseconds a call, the mean of `times` calls in a row."""
    begin = time.thread_time_ns()
    for _ in range(times):
        call(*arguments)
    return (time.thread_time_ns() - begin) / times / 1000


def interquartile(values: list[float]) -> float:
    low, _, high = statistics.quantiles(values, n=4)
    return high - low


def median_error(values: list[float]) -> float:
    """The standard error of a median, its spread taken from the quartiles."""
    return 0.93 * interquartile(values) / math.sqrt(len(values))


def written_or_returned(call: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
    copies = tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in arguments)
    result = call(*copies)
    if result is None:
        return tuple(a for a in copies if isinstance(a, torch.Tensor))
    return result if isinstance(result, tuple) else (result,)


def compare(subject: Subject, arguments: tuple[Any, ...]) -> None:
    """Contenders that do not compute the same are not compared: here, to a few ulps of the output, on average."""
    ours = written_or_returned(subject.native, arguments)
    theirs = written_or_returned(subject.plain, arguments)
    for mine, other in zip(ours, theirs, strict=True):
        apart = (mine.float() - other.float()).norm() / other.float().norm()
        if apart > 4 * torch.finfo(mine.dtype).eps:
            raise AssertionError(f"{subject.name}: the plain formula is {apart:.1e} away from the native op.")


def measure(subject: Subject, dtype: str, rows: int, width: int) -> dict[str, Any]:
    """One op at one size: the median and interquartile range of its microseconds, and native over plain, compiled."""
    torch._dynamo.reset()  # every size is compiled for itself, whatever came before
    dispatch.reset()
    torch.manual_seed(0)
    arguments = subject.arguments(rows, width, DTYPES[dtype])
    compare(subject, arguments)
    calls = contenders(subject)
    try:
        calls[DEFAULTS](*arguments)
    except InductorError:  # it cannot always compile what is written in place
        del calls[DEFAULTS]
    repeat = {}
    for name, call in calls.items():
        for _ in range(3):
            call(*arguments)
        repeat[name] = max(1, round(SECONDS_A_SAMPLE * 1e6 / sample(call, arguments, 3)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        # where tensors lie in memory makes one and the same code faster or slower: every round has its own places
        elsewhere = torch.empty(random.randrange(1, 1 << 20), dtype=torch.uint8)
        arguments = subject.arguments(rows, width, DTYPES[dtype])
        for name in random.sample(list(calls), len(calls)):
            calls[name](*arguments)  # what ran before has left its own data in the caches
            samples[name].append(sample(calls[name], arguments, repeat[name]))
        del elsewhere
    if (backend := dispatch.routes()[0].backend) != "native, compiled":
        raise RuntimeError(f"{subject.name}: the public call ran on {backend!r}, not compiled: nothing to compare.")
    ratios = [ours / theirs for ours, theirs in zip(samples[NATIVE], samples[PLAIN], strict=True)]
    noise = [again / theirs for again, theirs in zip(samples[AGAIN], samples[PLAIN], strict=True)]
    del samples[AGAIN]
    found = statistics.median(ratios), median_error(ratios), abs(statistics.median(noise) - 1) + 2 * median_error(noise)
    return {
        "op": subject.name, "dtype": dtype, "rows": rows, "width": width, "in_bar": subject.in_bar,
        "microseconds": {name: statistics.median(times) for name, times in samples.items()},
        "spread": {name: interquartile(times) for name, times in samples.items()},
        **dict(zip(RATIOS, found, strict=True)), "verdict": verdict(*found),
    }  # fmt: skip


def shown(rows: list[dict[str, Any]]) -> str:
    """The table, worst ratio first, and what it says of the bar."""
    times = (NATIVE, PLAIN, DEFAULTS, "functional compiled", "native", "plain", "functional", PUBLIC)
    lines = []
    for row in rows:
        numbers = [f"{row[name]:.3f}" for name in RATIOS]
        numbers += [f"{row['microseconds'][name]:.1f}" if name in row["microseconds"] else "fails" for name in times]
        lines.append([row["op"], row["dtype"], f"{row['rows']}x{row['width']}", *numbers, row["verdict"]])
    counts = Counter(row["verdict"] for row in rows if row["in_bar"])
    return f"""{table(["op", "dtype", "size", *RATIOS, *times, "verdict"], lines)}

Microseconds a call. ratio: native over plain, both compiled, the median over the rounds. ratio_error: its standard
error. noise: what that ratio is off for one function timed twice. public call: with the dispatch around it.
Bar: compiled native RMSNorm and gated norms at least as fast as the plain formula compiled. Of {counts.total()},
{counts["as fast"]} are, {counts["within noise"]} are slower by less than the noise, {counts["slower"]} are slower."""


def cpu_model() -> str:
    """What Linux calls it, or what Python does."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", metavar="OP", help="only ops with one of these words in their name")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there as well")
    options = parser.parse_args()
    chosen = [s for s in SUBJECTS if not options.ops or any(word in s.name for word in options.ops)]
    if not chosen:
        parser.error(f"no op has {' or '.join(options.ops)} in its name: {', '.join(s.name for s in SUBJECTS)}")
    torch.set_num_threads(1)
    work = [(s, dtype, *size) for s in chosen for dtype in DTYPES for size in s.sizes]
    measured = []
    with settings.override(backend="native", compile=True, strict=True):
        for place, (subject, dtype, rows, width) in enumerate(work, 1):
            print(f"{place} of {len(work)}: {subject.name}, {dtype}, {rows}x{width}", file=sys.stderr)
            measured.append(measure(subject, dtype, rows, width))
    measured.sort(key=lambda row: -float(row["ratio"]))
    about = {"cpu": cpu_model(), "threads": torch.get_num_threads(), "rounds": ROUNDS}
    print(", ".join(f"{name} {value}" for name, value in {**about, "torch": torch.__version__}.items()))
    print(shown(measured))
    if options.json:
        records.write(options.json, measured, **about)


if __name__ == "__main__":
    main()
