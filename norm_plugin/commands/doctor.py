"""norm-plugin doctor: says what is installed, what is hooked, what bypasses the hooks, and how exact every op is."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from norm_plugin.commands.errors import DIFFERENT, save
from norm_plugin.commands.terminal import Console, Table, escape
from norm_plugin.verify.health import Health, examine, line

DESCRIPTION = (
    "Says what is installed, which hooks of the installed engines are live or missing, what will go past them, and "
    "compares every op with its fp64 oracle on this machine. "
    "A command after -- is looked at too: norm-plugin doctor -- vllm serve /models/llama"
)
EXIT_CODES = "exit codes: 0 nothing is wrong; 1 something is, and is named; 2 it could not look, with the reason"


def add(verbs: Any) -> None:
    options = verbs.add_parser(
        "doctor", help="check this machine and its engines", description=DESCRIPTION, epilog=EXIT_CODES
    )
    options.add_argument("--no-probe", action="store_true", help="leave the numeric probe out")
    options.add_argument("--json", metavar="FILE", help="write everything there")
    options.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="what you would serve with")
    options.set_defaults(do=run)


def typed(options: argparse.Namespace) -> list[str]:
    """The command after the dashes."""
    command: list[str] = options.command
    return command[1:] if command[:1] == ["--"] else command


def run(options: argparse.Namespace, console: Console) -> int:
    health = examine(typed(options), probe=not options.no_probe)
    if options.json:
        write(health, options.json)
    show(health, console)
    return 0 if health.well else DIFFERENT


def write(health: Health, path: str) -> None:
    save(Path(path), json.dumps({**asdict(health), "well": health.well}, indent=1) + "\n")


def show(health: Health, console: Console) -> None:
    """Print what was found, and at the end what is wrong."""
    for name, version in health.versions.items():
        console.print(f"{name:<12} {escape(version)}", soft_wrap=True)
    for engine in health.engines:
        console.print(f"\n[bold]{engine['engine']} {engine['version']}[/]: {len(engine['hooks'])} hooks live")
        for hook, where in engine["hooks"].items():
            console.print(f"  [green]live[/]     {escape(hook)}: {escape(where)}", soft_wrap=True)
        for hook, reason in engine["missing"].items():
            console.print(f"  [yellow]missing[/]  {escape(hook)}: {escape(reason)}", soft_wrap=True)
    if health.bypassed:
        console.print("\n[bold]What goes past the hooks[/]")
        for one in health.bypassed:
            console.print(f"  {escape(one)}", soft_wrap=True)
    if health.probe:
        console.print()
        console.print(probed(health.probe))
    console.print()
    for one in health.misspelt:
        console.print(f"[yellow]misspelt?[/]  {escape(one)}", soft_wrap=True)
    for one in health.wrong:
        console.print(f"[bold red]wrong[/]  {escape(one)}", soft_wrap=True)
    console.print(f"[{'green' if health.well else 'bold red'}]{line(health)}[/]", soft_wrap=True)


def probed(rows: Sequence[dict[str, Any]]) -> Table:
    """A table with a row for each op: the worst of its variants, numerics and dtypes."""
    table = Table(
        title="Every op against its fp64 oracle, in ulps", title_justify="left", box=None, padding=(0, 2, 0, 0)
    )
    for heading in ("op", "runs on", "cases", "worst error", "its bound", ""):
        table.add_column(heading, justify="right" if heading in ("cases", "worst error", "its bound") else "left")
    for op in dict.fromkeys(row["op"] for row in rows):
        of_op = [row for row in rows if row["op"] == op]
        worst = max(of_op, key=lambda row: row["error"] / row["bound"])
        backends = ", ".join(dict.fromkeys(row["backend"] for row in of_op))
        verdict = "[green]pass[/]" if all(row["passed"] for row in of_op) else "[bold red]FAIL[/]"
        numbers = (str(len(of_op)), f"{worst['error']:.3f}", f"{worst['bound']:.3f}")
        table.add_row(op, backends, *numbers, verdict)
    return table
