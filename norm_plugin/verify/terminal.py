"""What verify prints: a table, what was left to the engine and why, and a summary."""

from __future__ import annotations

from typing import Any

from norm_plugin.commands.terminal import Console, Table, escape
from norm_plugin.verify import by_prompt
from norm_plugin.verify.by_prompt import number
from norm_plugin.verify.comparison import INSIDE, OUTSIDE
from norm_plugin.verify.verdict import Verdict, heading, remarks, summary


def show(verdicts: list[Verdict], about: dict[str, Any], console: Console) -> None:
    """Print the table, the remarks and the summary."""
    title = f"{heading(verdicts, about)}, {about['prompts']} prompts, {about['max_tokens']} tokens each"
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    table.add_column("model", no_wrap=True, overflow="fold")
    table.add_column("norms", justify="right")
    table.add_column("runs on")
    table.add_column("numerics")
    for column in ("same tokens", "max |Δ|", "mean |Δ|", "floor max", "floor mean"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for v in verdicts:
        colour = "green" if v.passed else "bold red" if v.differs else "yellow"
        table.add_row(
            escape(v.model), f"{len(v.taken)}/{len(v.taken) + len(v.others)}",
            ", ".join(v.backends), ", ".join(v.numerics),
            f"{len(v.patched.prompts) - v.patched.diverged}/{len(v.patched.prompts)}",
            *(number(x) for x in (v.patched.max, v.patched.mean, v.floor.max, v.floor.mean)),
            f"[{colour}]{v.verdict}[/]",
        )  # fmt: skip
    console.print(table)
    for v in verdicts:
        for line in remarks(v, about):
            console.print(f"[yellow]{escape(v.model)}[/]: {escape(line)}", soft_wrap=True)
    if len(verdicts) == 1 and verdicts[0].verdict in (INSIDE, OUTSIDE):
        console.print(each_prompt(verdicts[0]))
    what = "the requests in another order" + (", in smaller batches" if about["floor"] == "batches" else "")
    console.print(
        f"{summary(verdicts)}. |Δ|: of logprobs, up to the first other token; its mean: where anything differs. "
        f"Floor: stock against stock with {what}. {about['seconds']:.0f} s.",
        soft_wrap=True,
    )


def each_prompt(verdict: Verdict) -> Table:
    """The table with a row for each prompt."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in by_prompt.HEADINGS:
        table.add_column(column, justify="right")
    for row in by_prompt.rows(verdict):
        table.add_row(*row)
    return table
