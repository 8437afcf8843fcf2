"""norm-plugin tune: the launch configurations of this GPU."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from norm_plugin.commands.errors import need_gpu, save

DESCRIPTION = "Measures every launch configuration on this GPU and makes the table that norm_plugin.kernels reads."


def add(verbs: Any) -> None:
    """The verb and its options."""
    options = verbs.add_parser("tune", help="make the launch configurations of this GPU", description=DESCRIPTION)
    options.add_argument("--json", type=Path, default=Path("configs.json"), metavar="FILE", help="default configs.json")
    options.set_defaults(do=run)


def run(options: argparse.Namespace, console: Console) -> None:
    """The verb."""
    need_gpu()
    import torch

    from norm_plugin.bench import tune
    from norm_plugin.kernels.launch import gpu_of

    gpu = gpu_of(torch.device("cuda", torch.cuda.current_device()))
    entries = tune.table(tune.tune())
    save(options.json, json.dumps({gpu: entries}, indent=1) + "\n")
    shown = Table(title=f"Launch configurations of {gpu}, by row bytes", title_justify="left")
    for heading in ("op", "up to bytes", "warps", "rows", "late", "lean", "vector"):
        shown.add_column(heading, justify="left" if heading == "op" else "right")
    for family, rows in entries.items():
        for row in rows:
            shown.add_row(family, *map(str, row))
    console.print(shown)
    console.print(f"Written to {options.json}.", soft_wrap=True)
