"""Reads the reports of an engine's processes, and refuses other files: the folder may hold anything."""

from __future__ import annotations

import json
import os
import re
import stat
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: The first entry of every report.
FORMAT = "norm_plugin report 2"

#: Limits that no real report reaches.
MOST_BYTES = 64 << 20
MOST_CALLS = 10**15


class NotAReport(ValueError):
    """The file is no report, or was damaged; the message says how that is known."""


def read(folder: Path) -> list[dict[str, Any]]:
    """The processes that have written to the folder, the earliest first. `calls` of a row include those in graphs."""
    return look(folder)[0]


def look(folder: Path) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """As `read`, and the other files by name, with the reason why each is no report."""
    found, others = [], {}
    for path in sorted(folder.glob("*.json")):
        try:
            found.append(_summed(_checked(json.loads(_text(path)))))
        except NotAReport as error:
            others[path.name] = str(error)
        except OSError as error:
            others[path.name] = f"it cannot be read: {error.strerror}"
        except RecursionError:
            others[path.name] = "it is no JSON that a report could be"
        except ValueError:
            others[path.name] = "it is no JSON: another program's, or truncated"
    return found, others


def _text(path: Path) -> str:
    """The text of a regular file of reasonable size: a pipe would block the reader, a huge file fill the memory."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(handle, "rb") as file:
        about = os.fstat(file.fileno())
        if not stat.S_ISREG(about.st_mode):
            raise NotAReport("it is not a file")
        if about.st_size > MOST_BYTES:
            raise NotAReport(f"it has {about.st_size} bytes, which no report has")
        if about.st_size == 0:
            raise NotAReport("it is empty")
        return file.read(MOST_BYTES + 1).decode()


# --- what a report is made of -------------------------------------------------------------------------------------

Check = Callable[[Any], bool]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    return type(value) is int and 0 <= value < MOST_CALLS


def _texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(one, str) for one in value.values())


def _list(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _object(**fields: Check) -> Check:
    return lambda value: isinstance(value, dict) and all(check(value.get(name)) for name, check in fields.items())


_how = _object(backend=_is_text, because=_is_text, numerics=_is_text, configuration=_is_text)
_row = _object(
    **dict.fromkeys(("layer", "class", "op", "reason", "dtype"), _is_text),
    width=_is_number, strides=_list(_list(_is_number)), implementations=_list(_how),
)  # fmt: skip
_PROCESS = {
    **dict.fromkeys(("host", "started", "command", "started as"), _is_text),
    "pid": _is_number, "flags": _texts, "versions": _texts,
    "models": _list(_is_text),
    "engines": _list(_object(engine=_is_text, version=_is_text, hooks=_texts, missing=_texts)),
    "rows": _list(_row), "silent": _list(_row),
    "numbers": lambda value: _is_text(value) and re.fullmatch(r"(?:[0-9a-f]{16})*", value) is not None,
    "graphs": _list(_object(calls=lambda calls: isinstance(calls, dict) and all(map(_is_number, calls.values())))),
}  # fmt: skip


def _checked(process: Any) -> dict[str, Any]:
    if not isinstance(process, dict) or not str(process.get("report")).startswith("norm_plugin report"):
        raise NotAReport("it is another program's")
    if process["report"] != FORMAT:
        raise NotAReport(f"it was written by another version of norm_plugin, which calls it {process['report']!r}")
    for name, check in _PROCESS.items():
        if not check(process.get(name)):
            raise NotAReport(f"it is damaged: {name!r} is not what a report has there")
    numbers = process["numbers"] = [number for (number,) in struct.iter_unpack(">Q", bytes.fromhex(process["numbers"]))]
    if not all(map(_is_number, numbers)) or len(numbers) != len(process["rows"]) + len(process["graphs"]):
        raise NotAReport("it is damaged: there is not a number for each row")
    places = {str(place) for place in range(len(process["rows"]))}
    if any(not places.issuperset(graph["calls"]) for graph in process["graphs"]):
        raise NotAReport("it is damaged: a graph has calls of a row that is not there")
    return process


def _summed(process: dict[str, Any]) -> dict[str, Any]:
    rows, numbers = process["rows"], process.pop("numbers")
    replayed: Counter[int] = Counter()
    for graph, replays in zip(process["graphs"], numbers[len(rows) :], strict=True):
        graph["replays"] = replays
        for row, calls in graph["calls"].items():
            replayed[int(row)] += calls * replays
    for i, (row, eager) in enumerate(zip(rows, numbers, strict=False)):
        row["eager"], row["calls"], row["replayed"] = eager, eager + replayed[i], replayed[i]
    rows += [{**layer, "eager": 0, "calls": 0, "replayed": 0} for layer in process.pop("silent")]
    return process
