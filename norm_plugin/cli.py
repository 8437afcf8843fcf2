"""norm-plugin: the command line."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch

from norm_plugin.bench import arguments as bench_arguments

try:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text
except ModuleNotFoundError:
    sys.exit("norm-plugin prints with rich, which is not installed: pip install 'norm-plugin[cli]'.")

from norm_plugin.commands import patch

NO_GPU = 2
ON_A_GPU = ("bench", "tune")


class Parser(argparse.ArgumentParser):
    """One line for a wrong argument: argparse prints the whole usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} ({self.prog} --help)\n")


def parser() -> argparse.ArgumentParser:
    found = Parser(prog="norm-plugin", description="Norm kernels for vLLM and SGLang.")
    verbs = found.add_subparsers(dest="verb", required=True, metavar="VERB")
    bench_options = verbs.add_parser("bench", help="time ours and every peer", description=bench_arguments.DESCRIPTION)
    bench_arguments.add(bench_options)
    bench_options.set_defaults(do=bench)
    about = "Measures every launch configuration on this GPU and makes the table that norm_plugin.kernels reads."
    tune_options = verbs.add_parser("tune", help="make the launch configurations of this GPU", description=about)
    tune_options.add_argument("--json", type=Path, default=Path("configs.json"), metavar="FILE")
    tune_options.set_defaults(do=tune)
    patch.add(verbs)
    return found


def bench(options: argparse.Namespace, console: Console) -> None:
    from norm_plugin.bench import run, summary  # Triton, which a machine without a GPU need not have

    found = run.bench(options)
    for line in summary.lines(found):
        console.print(Text(line, style="red" if "MISSE" in line else ""), soft_wrap=True)


def tune(options: argparse.Namespace, console: Console) -> None:
    from norm_plugin.bench import tune as tuning
    from norm_plugin.kernels.launch import gpu_of

    gpu = gpu_of(torch.device("cuda", torch.cuda.current_device()))
    entries = tuning.table(tuning.tune())
    options.json.write_text(json.dumps({gpu: entries}, indent=1) + "\n")
    shown = Table(title=f"Launch configurations of {gpu}, by row bytes", title_justify="left")
    for heading in ("op", "up to bytes", "warps", "rows", "late", "lean", "vector"):
        shown.add_column(heading, justify="left" if heading == "op" else "right")
    for family, rows in entries.items():
        for row in rows:
            shown.add_row(family, *map(str, row))
    console.print(shown)
    console.print(f"Written to {options.json}.", soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    if options.verb in ON_A_GPU and not torch.cuda.is_available():
        print(f"norm-plugin {options.verb}: there is no GPU here that torch can use.", file=sys.stderr)
        sys.exit(NO_GPU)
    options.do(options, Console())
