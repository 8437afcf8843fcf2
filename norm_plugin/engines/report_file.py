"""The report of one process: a JSON file that is whole at every moment, whatever kills the process.

Whatever changes rarely is written anew, to another file that takes the place of the first. The numbers of calls change
all the time: each stands in the file right-aligned in 16 bytes, on a 16-byte boundary, and is written there through a
memory map, which the kernel keeps when the process is gone.
"""

from __future__ import annotations

import json
import logging
import mmap
import os
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol

from norm_plugin import settings

log = logging.getLogger("norm_plugin")

CELL = 16
STARTED = time.time()


class Counted(Protocol):
    """What has a number in the file."""

    cell: memoryview | None


#: A JSON object as text, what has a number at its end, and the number.
Entry = tuple[str, Counted | None, int]


class ReportError(OSError):
    """NORM_PLUGIN_STRICT=1, and the report cannot be written."""


_path: Path | None = None
_counters: list[Counted] = []


def write(head: dict[str, Any], rows: Iterable[Entry], graphs: Iterable[Entry]) -> bool:
    """Write the file of this process anew. False: it cannot be written, which is logged."""
    text = Text()
    text.add(json.dumps({**_process(), **head}, indent=1)[:-2] + ',\n "rows": [')
    text.counted(rows, "eager")
    text.add('],\n "graphs": [')
    text.counted(graphs, "replays")
    text.add("]\n}\n")
    try:
        view = _put(text.bytes())
    except OSError as error:
        close()
        message = f"NORM_PLUGIN_REPORT={settings.get().report}: the report cannot be written: {error}"
        if settings.get().strict:
            raise ReportError(f"{message}. NORM_PLUGIN_STRICT=1 forbids going on without.") from error
        log.warning("%s. This process goes on without.", message)
        return False
    _counters[:] = [counter for counter, _ in text.cells]
    for counter, offset in text.cells:
        counter.cell = view[offset : offset + CELL]
    return True


class Text:
    """The file, and where in it the numbers stand."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.length = 0
        self.cells: list[tuple[Counted, int]] = []

    def add(self, text: str) -> None:
        """Append."""
        self.parts.append(text.encode("ascii"))
        self.length += len(self.parts[-1])

    def counted(self, entries: Iterable[Entry], name: str) -> None:
        """Append objects, each with a number at its end."""
        for i, (fields, counter, number) in enumerate(entries):
            self.add(("," if i else "") + "\n  " + fields[:-1] + f', "{name}":')
            self.add(" " * (-self.length % CELL))
            if counter is not None:
                self.cells.append((counter, self.length))
            self.add(f"{number:{CELL}d}}}")

    def bytes(self) -> bytes:
        """All of it."""
        return b"".join(self.parts)


def _put(data: bytes) -> memoryview:
    global _path
    if _path is None:
        folder = Path(settings.get().report or "")
        folder.mkdir(parents=True, exist_ok=True)
        moment = datetime.fromtimestamp(STARTED, timezone.utc)
        _path = folder / f"{moment:%Y%m%dT%H%M%S}-{socket.gethostname()}-{os.getpid()}.json"
    handle, name = tempfile.mkstemp(prefix=f".{_path.stem}-", suffix=".tmp", dir=_path.parent)
    try:
        with os.fdopen(handle, "r+b") as file:
            file.write(data)
            file.flush()
            mapped = mmap.mmap(file.fileno(), 0)
        os.chmod(name, 0o644)
        os.replace(name, _path)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise
    return memoryview(mapped)


def close() -> None:
    """Leave the file as it is; the next one is another."""
    global _path
    _path = None
    for counter in _counters:
        counter.cell = None
    _counters.clear()


def read(folder: Path) -> list[dict[str, Any]]:
    """The processes that have written there, the earliest first; `calls` of a row are those in graphs as well."""
    return [_summed(json.loads(path.read_text())) for path in sorted(folder.glob("*.json"))]


def _summed(process: dict[str, Any]) -> dict[str, Any]:
    replayed: Counter[int] = Counter()
    for graph in process["graphs"]:
        for row, calls in graph["calls"].items():
            replayed[int(row)] += calls * graph["replays"]
    for i, row in enumerate(process["rows"]):
        row["calls"], row["replayed"] = row["eager"] + replayed[i], replayed[i]
    return process


def _process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": datetime.fromtimestamp(STARTED, timezone.utc).isoformat(timespec="seconds"),
        "command": _command(),
        "flags": {flag.name: os.environ[flag.name] for flag in settings.FLAGS if flag.name in os.environ},
    }


def _command() -> str:
    """What `ps` shows: engines write the role of a process there."""
    try:
        words = Path("/proc/self/cmdline").read_bytes().split(b"\0")
    except OSError:
        return " ".join(sys.argv)
    return b" ".join(words).decode(errors="replace").strip()
