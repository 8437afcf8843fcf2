#!/usr/bin/env python
"""Writes what README.md takes from the code and from results: `python scripts/readme.py`."""

import re
from pathlib import Path

from norm_plugin import numerics, settings

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


def verified() -> str:
    """A run of verify that was kept: its command and what it printed."""
    kept = (ROOT / "scripts" / "results" / "verify-vllm.txt").read_text(encoding="utf-8")
    return f"```console\n{kept.rstrip()}\n```"


TABLES = {"flags": settings.table, "numerics": numerics.table, "verify": verified}


def rewritten(text: str) -> str:
    """`text` with every table between its two marks made anew."""
    for name, table in TABLES.items():
        marks = re.compile(rf"(<!-- {name}: [^\n]*-->\n).*?(<!-- end of {name} -->)", re.DOTALL)
        text, found = marks.subn(lambda m, table=table: m[1] + table() + "\n" + m[2], text)
        if found != 1:
            raise ValueError(f"README.md has the marks of the table {name!r} {found} times; it must have them once.")
    return text


if __name__ == "__main__":
    README.write_text(rewritten(README.read_text(encoding="utf-8")), encoding="utf-8")
