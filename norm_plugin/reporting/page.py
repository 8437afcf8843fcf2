"""Writes the page of a report: a line for each group of layers, which opens."""

from __future__ import annotations

from datetime import datetime, timezone
from html import escape
from itertools import groupby
from typing import Any

from norm_plugin.commands.terminal import printable
from norm_plugin.document import about, document
from norm_plugin.reporting import groups
from norm_plugin.reporting.groups import Group

STYLE = """
h3 { font-size: 1rem; margin: 1.5rem 0 .3rem }
details { border-bottom: 1px solid #ddd; padding: .25rem 0; overflow-wrap: anywhere }
summary { cursor: pointer } summary b { font-weight: 600 } .count { color: #57575f }
details ul { margin: .2rem 0 .4rem; color: #57575f } td:first-child { overflow-wrap: anywhere }
.here { border-left: 4px solid #1a7f37; padding-left: .6rem }
.engine, .none { border-left: 4px solid #bf8700; padding-left: .6rem }
"""
CLASSES = {groups.OURS: "here", groups.ENGINES: "engine", groups.NONE: "none"}


def page(processes: list[dict[str, Any]], others: dict[str, str]) -> str:
    """The page; `others` are the files that are no reports."""
    body = "".join(map(section, processes))
    if others:
        listed = "".join(
            f"<li>{escape(printable(name))}: {escape(printable(why))}</li>" for name, why in others.items()
        )
        body += f"<h2>Files that are no reports</h2><ul>{listed}</ul>"
    written = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return document("Who normalized", body, f"norm-plugin report, written at {written}", STYLE)


def section(process: dict[str, Any]) -> str:
    parts = [f"<section><h2>{escape(groups.title(process))}</h2>{about(groups.about(process))}"]
    parts.append(f"<p><strong>{escape(groups.summary(process))}</strong></p>")
    for state, found in groupby(groups.groups(process["rows"]), key=lambda group: group.state):
        parts.append(f"<h3>{escape(state.capitalize())}</h3>" + "".join(map(_group, found)))
    return "".join(parts) + "</section>\n"


def _group(group: Group) -> str:
    facts = "".join(f"<li>{escape(fact)}</li>" for fact in group.facts)
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{calls}</td><td>{replayed}</td></tr>" for name, calls, replayed in group.layers
    )
    return (
        f'<details class="{CLASSES[group.state]}"><summary><b>{escape(group.name)}</b> '
        f'<span class="count">{escape(group.count)}; {escape(group.facts[0])}</span></summary><ul>{facts}</ul>'
        f'<div class="wide"><table><tr><th>layer</th><th>calls</th><th>in CUDA graphs</th></tr>{rows}</table></div>'
        "</details>"
    )
