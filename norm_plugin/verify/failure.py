"""Finds out of an engine's log why it failed: its first exception and those that this one caused, whole.

Later exceptions come from processes that only saw another one die, and may guess wrong.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

BEGIN = "Traceback (most recent call last):"
CHAINED = ("The above exception was the direct cause", "During handling of the above exception")
LAST_LINES = 12

#: What loggers write before a line: vLLM's process and place, SGLang's time.
_PROCESS = re.compile(r"^\(\w+(?:[ _]\w+)* pid=\d+\) ?")
_PLACE = re.compile(r"^(?:[A-Z]{4,8} \d\d-\d\d \d\d:\d\d:\d\d \[[^\]]+\]|\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[^\]]*\]) ?")
_FRAME = re.compile(r'^\s+File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<name>.+)$')


def reason(log: str) -> str:
    """The first exception and what it caused; the last lines where there is none."""
    found = list(_first_chain(_of_one_process(log.splitlines())))
    lines = [line.rstrip() for line in log.splitlines() if line.strip()]
    return "\n".join(found or lines[-LAST_LINES:] or ["(nothing)"])


def _of_one_process(lines: list[str]) -> list[str]:
    """The lines of the process that failed first, from its exception on, without the prefixes of its logger."""
    start = next((i for i, line in enumerate(lines) if BEGIN in line), None)
    if start is None:
        return []
    process = _process(lines[start])
    mine = [line for line in lines[start:] if _process(line) == process]
    return [_PLACE.sub("", line[len(process) :]) for line in mine]


def _process(line: str) -> str:
    found = _PROCESS.match(line)
    return found[0] if found else ""


def _first_chain(lines: list[str]) -> Iterator[str]:
    """Exceptions that caused each other: where, and the message."""
    place = 0
    while place < len(lines) and BEGIN in lines[place]:
        place, where = _frames(lines, place + 1)
        end = _end(lines, place)
        yield from (line.rstrip() for line in lines[place:end])
        if where:
            yield f"    at {where}"
        chained = [line for line in lines[end : end + 3] if line.startswith(CHAINED)]
        if not chained:
            return
        yield chained[0].strip()
        place = next((i for i, line in enumerate(lines[end : end + 6], end) if BEGIN in line), len(lines))


def _frames(lines: list[str], place: int) -> tuple[int, str]:
    """Where the message begins, and the last frame before it."""
    where = ""
    while place < len(lines) and (not lines[place].strip() or lines[place][:1].isspace()):
        if found := _FRAME.match(lines[place]):
            where = f"{found['file']}:{found['line']} in {found['name']}"
        place += 1
    return place, where


def _end(lines: list[str], begin: int) -> int:
    """Where the message ends: with a blank line, or the next exception."""
    ends = (i for i in range(begin, len(lines)) if not lines[i].strip() or BEGIN in lines[i])
    return next(ends, len(lines))


def kept(log: Path, engine: str) -> str:
    """Keep a copy of the log, and say where."""
    place = Path(tempfile.gettempdir()) / f"norm-plugin-{engine}-{time.strftime('%Y%m%dT%H%M%S')}-{log.name}"
    try:
        shutil.copyfile(log, place)
    except OSError as error:
        with contextlib.suppress(OSError):
            place.unlink()
        return f"The whole log could not be kept: {place.parent}: {error.strerror}. TMPDIR names another folder."
    return f"The whole log: {place}"
