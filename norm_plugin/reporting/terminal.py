"""Prints a report: a few lines for each group of layers. No terminal is too narrow: names are never cut."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from norm_plugin.commands.terminal import Console, Text, printable
from norm_plugin.reporting import groups
from norm_plugin.reporting.groups import Group

COLOURS = {groups.OURS: "green", groups.ENGINES: "yellow", groups.NONE: "yellow"}


def show(process: dict[str, Any], console: Console) -> None:
    _put(console, (groups.title(process), "bold"))
    for name, what in groups.about(process):
        style = "yellow" if name == "missing hook" else ""
        _put(console, (f"{name}: ", "dim"), (what, style), indent=2)
    for state, found in groupby(groups.groups(process["rows"]), key=lambda group: group.state):
        console.print(Text(f"\n{state.capitalize()}", f"bold {COLOURS[state]}"))
        for group in found:
            _group(group, console)
    console.print()
    _put(console, (groups.summary(process), "bold"))
    console.print()


def _group(group: Group, console: Console) -> None:
    _put(console, (group.name, "bold"), (f": {group.count}", ""), indent=2)
    for fact in group.facts:
        _put(console, (fact, ""), indent=6)


def skipped(others: dict[str, str], console: Console) -> None:
    """Print the files of the folder that are no reports."""
    for name, why in others.items():
        _put(console, (f"{printable(name)} is no report: {printable(why)}", "yellow"))


def _put(console: Console, *pieces: tuple[str, str], indent: int = 0) -> None:
    """Print texts with their styles. A terminal breaks long lines and cuts none; a file or a pipe gets whole lines."""
    if console.is_terminal:
        from rich.padding import Padding  # without rich no console is a terminal

        console.print(Padding(Text.assemble(*pieces, overflow="fold"), (0, 0, 0, indent), expand=False))
    else:
        console.print(Text.assemble((" " * indent, ""), *pieces), soft_wrap=True)
