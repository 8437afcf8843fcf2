"""What report prints: a few lines for each kind of layer, in a terminal of any width without a name being cut."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from norm_plugin.reporting import groups
from norm_plugin.reporting.groups import Group, plain

COLOURS = {groups.OURS: "green", groups.ENGINES: "yellow", groups.NONE: "yellow"}


def show(process: dict[str, Any], console: Console) -> None:
    """One process."""
    _put(Text(groups.title(process), "bold"), console)
    for name, what in groups.about(process):
        style = "yellow" if name == "missing hook" else ""
        _put(Text.assemble((f"{name}: ", "dim"), (what, style)), console, 2)
    for state, found in groupby(groups.groups(process["rows"]), key=lambda group: group.state):
        console.print(Text(f"\n{state.capitalize()}", f"bold {COLOURS[state]}"))
        for group in found:
            _group(group, console)
    console.print()
    _put(Text(groups.summary(process), "bold"), console)
    console.print()


def _group(group: Group, console: Console) -> None:
    _put(Text.assemble((group.name, "bold"), f": {group.count}"), console, 2)
    for fact in group.facts:
        _put(Text(fact), console, 6)


def skipped(others: dict[str, str], console: Console) -> None:
    """The files of the folder that are no reports."""
    for name, why in others.items():
        _put(Text(f"{plain(name)} is no report: {plain(why)}", "yellow"), console)


def _put(text: Text, console: Console, indent: int = 0) -> None:
    """Broken where a line of a terminal ends, and nowhere cut; what goes to a file or a pipe has whole lines."""
    text.overflow = "fold"
    if console.is_terminal:
        console.print(Padding(text, (0, 0, 0, indent), expand=False))
    else:
        console.print(Text(" " * indent) + text, soft_wrap=True)
