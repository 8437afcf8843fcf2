"""norm-plugin tune: measures the launch configurations of this GPU."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from norm_plugin.commands.errors import need_gpu, save
from norm_plugin.commands.terminal import Console, Table

DESCRIPTION = (
    "Measures every launch configuration on this GPU and makes the table that norm_plugin.kernels reads: configs.json "
    "of the ops, or with --backward backward_configs.json of their gradients."
)

#: The columns of an entry after the largest row that it is for, in bytes.
FORWARD = "warps rows late lean vector"
BACKWARD = "warps rows programs stages"


def add(verbs: Any) -> None:
    options = verbs.add_parser("tune", help="make the launch configurations of this GPU", description=DESCRIPTION)
    options.add_argument("--backward", action="store_true", help="of the backward kernels")
    options.add_argument("--json", type=Path, metavar="FILE", help="default configs.json or backward_configs.json")
    options.set_defaults(do=run)


def run(options: argparse.Namespace, console: Console) -> None:
    need_gpu()
    import torch

    from norm_plugin.bench import tune, tune_backward
    from norm_plugin.kernels.launch import gpu_of

    gpu = gpu_of(torch.device("cuda", torch.cuda.current_device()))
    if options.backward:
        what, columns, entries = "Backward launch", BACKWARD, tune_backward.table(tune_backward.tune())
    else:
        what, columns, entries = "Launch", FORWARD, tune.table(tune.tune())
    file = options.json or Path("backward_configs.json" if options.backward else "configs.json")
    save(file, json.dumps({gpu: entries}, indent=1) + "\n")
    shown = Table(title=f"{what} configurations of {gpu}, by row bytes", title_justify="left")
    shown.add_column("op")
    for heading in ("up to bytes", *columns.split()):
        shown.add_column(heading, justify="right")
    for table, rows in entries.items():
        for row in rows:
            shown.add_row(table, *map(str, row))
    console.print(shown)
    console.print(f"Written to {file}.", soft_wrap=True)
