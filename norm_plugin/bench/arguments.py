"""The options of the benchmark, for its two doors: norm-plugin bench, and python -m norm_plugin.bench.run."""

from __future__ import annotations

import argparse
from pathlib import Path

from norm_plugin.bench.grid import PARTS, PASSES

DESCRIPTION = "Times ours and every peer that can be imported on this GPU, and writes JSON."


def ops_of(text: str) -> list[str]:
    """A list of ops, or an error that names those there are."""
    ops = text.split(",")
    if unknown := [op for op in ops if op not in PASSES]:
        raise argparse.ArgumentTypeError(f"no op {unknown[0]!r}; there are {', '.join(PASSES)}")
    return ops


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--part", choices=PARTS, help="one part; otherwise all of them, one after the other")
    parser.add_argument("--ops", type=ops_of, default=[], metavar="A,B", help="only these ops of the part")
    parser.add_argument("--quick", action="store_true", help="a few points of each op")
    parser.add_argument("--json", type=Path, default=Path("bench.json"), metavar="FILE", help="merged into if there")
    parser.add_argument("--seconds", type=float, default=520.0, help="a part starts no point after this long")
