"""norm-plugin bench: times our kernels and every peer's on a GPU."""

from __future__ import annotations

import argparse
from typing import Any

from norm_plugin.bench import arguments
from norm_plugin.commands.errors import need_gpu
from norm_plugin.commands.terminal import Console, Text


def add(verbs: Any) -> None:
    options = verbs.add_parser("bench", help="time ours and every peer", description=arguments.DESCRIPTION)
    arguments.add(options)
    options.set_defaults(do=run)


def run(options: argparse.Namespace, console: Console) -> None:
    need_gpu()
    from norm_plugin.bench import run as benchmark  # it imports Triton, which a machine without a GPU may not have
    from norm_plugin.bench import summary

    for line in summary.lines(benchmark.bench(options)):
        console.print(Text(line, style="red" if "MISSE" in line else ""), soft_wrap=True)
