"""The parts of rich that the commands use, as plain text, for a machine without rich."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any

#: Stands for an opening bracket that is no markup.
_BRACKET = "\x02"


def escape(markup: str) -> str:
    """The text with its brackets escaped, so that none is read as markup."""
    return markup.replace("[", _BRACKET)


def bare(text: str) -> str:
    return re.sub(r"\[[a-z /]*\]", "", text).replace(_BRACKET, "[")


class Text:
    """Text that is printed as it is, without markup."""

    def __init__(self, text: str, style: str = "") -> None:
        self.text = text

    @classmethod
    def assemble(cls, *pieces: tuple[str, str]) -> Text:
        """One text of several pieces, each with a style."""
        return cls("".join(text for text, _ in pieces))

    def __str__(self) -> str:
        return self.text


class Table:
    """A table. Cells may have several lines."""

    def __init__(self, *headings: str, title: str | None = None, **look: Any) -> None:
        self.title = title
        self.headings = list(headings)
        self.right = [False] * len(headings)
        self.rows: list[list[str]] = []

    def add_column(self, heading: str = "", justify: str = "left", **look: Any) -> None:
        self.headings.append(heading)
        self.right.append(justify == "right")

    def add_row(self, *cells: str) -> None:
        """Add a row; missing cells are empty."""
        self.rows.append([bare(str(cell)) for cell in cells] + [""] * (len(self.headings) - len(cells)))

    def __str__(self) -> str:
        rows = [[cell.split("\n") for cell in row] for row in [self.headings, *self.rows]]
        lines = [line for row in rows for line in zip_longest(*row, fillvalue="")]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        pads = [f"{'>' if right else '<'}{width}" for right, width in zip(self.right, widths, strict=True)]
        shown = ["  ".join(map(format, line, pads)).rstrip() for line in lines]
        return "\n".join([bare(self.title), *shown] if self.title else shown)


class Console:
    """Prints to standard output, or to standard error."""

    is_terminal = False
    width = sys.maxsize  # lines are never cut

    def __init__(self, stderr: bool = False, **look: Any) -> None:
        self.stderr = stderr

    def print(self, *shown: object, **look: Any) -> None:
        """Print them on one line."""
        file = sys.stderr if self.stderr else sys.stdout
        print(*(bare(one) if isinstance(one, str) else one for one in shown), file=file, flush=self.stderr)

    def print_json(self, json: str) -> None:
        print(json, file=sys.stderr if self.stderr else sys.stdout)

    @contextmanager
    def status(self, status: str) -> Iterator[Console]:
        """A status line as long as the block runs: nothing is shown, as plain text has no line that changes."""
        yield self

    def update(self, status: str) -> None:
        """Show nothing."""
