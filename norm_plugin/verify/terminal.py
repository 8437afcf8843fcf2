"""What verify prints: a table, what was left to the engine and why, and a summary."""

from __future__ import annotations

from typing import Any

from norm_plugin.commands.terminal import Console, Table, escape
from norm_plugin.verify.comparison import INSIDE, OUTSIDE
from norm_plugin.verify.verdict import PROMPT_HEADINGS, Verdict, heading, number, prompt_rows, remarks, summary

HEADINGS = (
    "model", "norms", "runs on", "numerics", "same tokens", "max |Δ|", "mean |Δ|", "floor max", "floor mean", "verdict",
)  # fmt: skip
WORDS = ("model", "runs on", "numerics", "verdict")  # columns that are no numbers
GAP = 2  # between columns


def show(verdicts: list[Verdict], about: dict[str, Any], console: Console) -> None:
    """Print the table, the remarks and the summary."""
    title = f"{heading(verdicts, about)}, {about['prompts']} prompts, {about['max_tokens']} tokens each"
    console.print(f"[bold]{escape(title)}[/]", soft_wrap=True)
    rows = [row(v) for v in verdicts]
    if sum(max(map(len, cells)) + GAP for cells in zip(HEADINGS, *rows, strict=True)) <= console.width:
        console.print(as_table(verdicts, rows))
    else:
        for v, cells in zip(verdicts, rows, strict=True):
            console.print(as_lines(v, cells), soft_wrap=True)
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


def row(v: Verdict) -> tuple[str, ...]:
    """What is said of one model, in the order of HEADINGS."""
    same = f"{len(v.patched.prompts) - v.patched.diverged}/{len(v.patched.prompts)}"
    numbers = (number(x) for x in (v.patched.max, v.patched.mean, v.floor.max, v.floor.mean))
    norms = f"{len(v.taken)}/{len(v.taken) + len(v.others)}"
    return v.model, norms, ", ".join(v.backends), ", ".join(v.numerics), same, *numbers, v.verdict


def coloured(v: Verdict) -> str:
    return f"[{'green' if v.passed else 'bold red' if v.differs else 'yellow'}]{v.verdict}[/]"


def as_table(verdicts: list[Verdict], rows: list[tuple[str, ...]]) -> Table:
    table = Table(box=None, padding=(0, GAP, 0, 0))
    for name in HEADINGS:
        table.add_column(name, justify="left" if name in WORDS else "right", no_wrap=True)
    for v, cells in zip(verdicts, rows, strict=True):
        table.add_row(*map(escape, cells[:-1]), coloured(v))
    return table


def as_lines(v: Verdict, cells: tuple[str, ...]) -> str:
    """One model in a terminal that is too narrow for the table, which would cut the verdict."""
    said = ", ".join(f"{name} {cell}" for name, cell in zip(HEADINGS[1:-1], cells[1:-1], strict=True) if cell)
    return f"{escape(v.model)}: {coloured(v)}\n  {escape(said)}"


def each_prompt(verdict: Verdict) -> Table:
    """The table with a row for each prompt."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in PROMPT_HEADINGS:
        table.add_column(column, justify="right", overflow="fold")
    for row in prompt_rows(verdict):
        table.add_row(*row)
    return table
