"""`python -m norm_plugin.accuracy` compares every op with its fp64 oracle on this machine, and prints a table."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from norm_plugin.accuracy import table
from norm_plugin.accuracy.table import Row
from norm_plugin.commands.terminal import Console, Table, escape


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m norm_plugin.accuracy",
        description="Compares every op with its fp64 oracle on this machine, on a GPU where there is one. "
        "The exit code is 1 if one is further off than its bound.",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there as well")
    return parser.parse_args(arguments)


def rendered(rows: Sequence[Row], notes: Sequence[str]) -> Table:
    """The rows, with an empty line between ops. The reason of a backend is the number of a note."""
    title = "Every op against its fp64 oracle, in ulps of its output"
    shown = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    shown.add_column("op")
    for heading in ("numerics", "dtype", "backend"):
        shown.add_column(heading, no_wrap=True)
    for heading in ("error", "mean", "bound"):
        shown.add_column(heading, justify="right", no_wrap=True)
    shown.add_column("")
    before = None
    for row in rows:
        if before is not None and row.op != before.op:
            shown.add_row()
        op = f"{row.op}, {row.variant}" if row.variant else row.op
        new = before is None or (row.op, row.variant, row.numerics) != (before.op, before.variant, before.numerics)
        what = (op, row.numerics) if new else ("", "")
        backend = f"{row.backend} [{notes.index(row.reason) + 1}]" if row.reason else row.backend
        numbers = (f"{row.error:.4f}", f"{row.mean:.4f}", f"{row.bound:.4f}")
        verdict = "[green]pass[/]" if row.passed else f"[bold red]FAIL[/] ({row.inputs})"
        shown.add_row(*what, row.dtype, escape(backend), *numbers, verdict)
        before = row
    return shown


def main(arguments: Sequence[str] | None = None) -> int:
    options = parsed(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # a pipe has no width, and the table needs so much
    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    begin = time.monotonic()
    rows = []
    with Console(stderr=True).status("comparing") as status:
        for row in table.rows(device):
            rows.append(row)
            status.update(f"comparing: {len(rows)} of {table.count()}")
    notes = list(dict.fromkeys(row.reason for row in rows if row.reason))
    console.print(rendered(rows, notes))
    console.print("error, bound: of the element that comes nearest to its own bound. mean: of all elements.")
    for number, reason in enumerate(notes, 1):
        console.print(escape(f"[{number}] {reason}"))
    failed = sum(not row.passed for row in rows)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"the CPU ({platform.machine()})"
    console.print(
        f"\n{len(rows) - failed} of {len(rows)} rows within their bounds, "
        f"on {where}, torch {torch.__version__}, in {time.monotonic() - begin:.0f} s."
    )
    if options.json:
        what = {"torch": torch.__version__, "device": where, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(what, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
