"""norm-plugin report: which layer ran what, how often, and why not another."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from norm_plugin.commands import verify
from norm_plugin.commands.errors import WRONG_ARGUMENT, CommandError, save
from norm_plugin.commands.terminal import Console, Table, escape
from norm_plugin.engines import ENGINES, report_file
from norm_plugin.verify.runs import Plan, Run, execute

DESCRIPTION = (
    "Reads the folder that NORM_PLUGIN_REPORT names, of a server that runs or has ended in whatever way; or, with "
    "--engine, runs a few prompts through a patched engine and reports on that."
)


def add(verbs: Any) -> None:
    """The verb and its options."""
    options = verbs.add_parser("report", help="say which layer ran what, and why", description=DESCRIPTION)
    options.add_argument("folder", type=Path, nargs="?", metavar="FOLDER", help="what NORM_PLUGIN_REPORT names")
    options.add_argument("--engine", choices=ENGINES, help="run this engine now")
    options.add_argument("--model", default="tiny:llama", metavar="PATH|tiny:NAME", help="with --engine")
    options.add_argument("--backend", choices=("auto", "triton", "native"), default="auto", help="with --engine")
    options.add_argument("--device", choices=("cpu", "cuda"), help="with --engine; default: cuda if torch has it")
    options.add_argument("--python", default=sys.executable, metavar="PATH", help="the interpreter with the engine")
    options.add_argument("--json", type=Path, metavar="FILE", help="write it there as well")
    options.set_defaults(do=run)


def run(options: argparse.Namespace, console: Console) -> None:
    """The verb."""
    if (options.folder is None) == (options.engine is None):
        raise CommandError("give a FOLDER that a server has written, or --engine to run one.", WRONG_ARGUMENT)
    processes = ran(options) if options.engine else read(options.folder)
    if options.json:
        save(options.json, json.dumps(processes, indent=1) + "\n")
    for process in processes:
        show(process, console)


def read(folder: Path) -> list[dict[str, Any]]:
    """What processes have written there."""
    processes = report_file.read(folder) if folder.is_dir() else []
    if not processes:
        raise CommandError(
            f"there is no report in {folder}. A server writes one, once its model is loaded, if it was started with "
            f"NORM_PLUGIN_REPORT={folder} and NORM_PLUGIN=auto, triton or native; `norm-plugin doctor` says whether "
            "it is hooked."
        )
    return processes


def ran(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One run of an engine, as a process of a report."""
    verify.check_engine(options.engine, options.python)
    device = options.device or verify.find_device()
    (model,) = verify.find_models(options.model, options.engine, device)[:1]
    with tempfile.TemporaryDirectory(prefix="norm-plugin-") as folder:
        arguments = ["--device", device]
        plan = Plan(options.engine, options.python, [model], verify.find_prompts(None)[:4], Path(folder), arguments)
        with verify.watching("patched", plan) as watch:
            (outcome,) = execute(plan, Run("patched", verify.patched_flags(options.backend)), watch)
    engine = {"engine": outcome.engine, "version": outcome.version, "hooks": outcome.hooks, "missing": outcome.missing}
    return [{"command": str(model), "engines": [engine], "flags": outcome.flags, "rows": outcome.rows}]


# --- what is printed ----------------------------------------------------------------------------------------------


def show(process: dict[str, Any], console: Console) -> None:
    """One process."""
    for engine in process["engines"]:
        console.print(f"[bold]{engine['engine']} {engine['version']}[/] {escape(process['command'])}", soft_wrap=True)
        for hook, reason in engine["missing"].items():
            console.print(f"  [yellow]the hook {escape(hook)} is missing: {escape(reason)}[/]", soft_wrap=True)
    if "pid" in process:
        alive = Path(f"/proc/{process['pid']}").exists()
        state = "runs" if alive else "has ended"
        console.print(
            f"process {process['pid']} on {process['host']}, since {process['started']}, {state} (if on this host)"
        )
    console.print(table(process["rows"]))
    calls = sum(row["calls"] for row in process["rows"] if not row["reason"])
    kept = sum(row["calls"] for row in process["rows"] if row["reason"])
    silent = sum(not row["op"] for row in process["rows"])
    console.print(f"{calls} calls ran here, {kept} were left to the engine, {silent} layers were never called.\n")


def table(rows: list[dict[str, Any]]) -> Table:
    """A row for each layer, and for each op and reason that it has had."""
    found = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("layer", "class", "op", "width", "dtype", "strides", "runs on", "numerics", "configuration"):
        found.add_column(
            heading, no_wrap=heading in ("op", "width", "dtype"), justify="right" if heading == "width" else "left"
        )
    found.add_column("calls", justify="right")
    for row in rows:
        how = row["implementations"]
        where = ", ".join(dict.fromkeys(_where(entry) for entry in how))
        if row["reason"]:
            where = f"[yellow]the engine: {escape(row['reason'])}[/]"
        elif not row["op"]:
            where = "[yellow]the engine: never called through a hook[/]"
        graphs = f" ({row['replayed']} in graphs)" if row["replayed"] else ""
        found.add_row(
            escape(row["layer"]), row["class"], row["op"], str(row["width"] or ""), row["dtype"],
            " ".join(str(tuple(strides)) for strides in row["strides"]), where,
            ", ".join(dict.fromkeys(entry["numerics"] for entry in how)),
            ", ".join(dict.fromkeys(entry["configuration"] for entry in how)), f"{row['calls']}{graphs}",
        )  # fmt: skip
    return found


def _where(entry: dict[str, str]) -> str:
    return escape(f"{entry['backend']}: {entry['because']}" if entry["because"] else entry["backend"])
