"""What the commands print with: rich, or plain text if rich is not installed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text
else:
    try:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table
        from rich.text import Text
    except ModuleNotFoundError:
        from norm_plugin.commands.plain import Console, Table, Text, escape

__all__ = ["Console", "Table", "Text", "escape", "printable"]


def printable(text: str) -> str:
    """The text on one line, without anything that controls a terminal: a file may have any name."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
