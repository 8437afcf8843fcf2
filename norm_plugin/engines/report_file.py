"""The report of one process: a JSON file with a call count for each layer, up to date at the end of each forward.

When more than a count changes, a new file is written and replaces the old one. The counts stand in one block of the
file, 16 hexadecimal digits each, and one write to an open descriptor updates all of them. What a system call has
written survives when the process is killed. And if somebody truncates or deletes the file, that does not hurt the
process; it could if the file were mapped into memory.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from struct import Struct
from typing import Any

from norm_plugin import settings
from norm_plugin.engines import command_line, versions
from norm_plugin.engines.report_reader import FORMAT
from norm_plugin.engines.report_reader import read as read  # whoever knows the file writes and reads it here

log = logging.getLogger("norm_plugin")

#: Digits of a count. Counts are aligned to this, so that none crosses a cache line and is read half written.
CELL = 16


@dataclass(eq=False, kw_only=True)
class Counted:
    """A layer's calls or a CUDA graph: `calls` is its count, written at offset `place`, or nowhere if that is -1.

    `forward`: the number of the forward that called it last. `ends`: whether it ends a forward, None if unknown.
    """

    calls: int = 0
    place: int = -1
    forward: int = 0
    ends: bool | None = None


class ReportError(OSError):
    """The report cannot be written, and NORM_PLUGIN_STRICT=1 forbids going on without."""


_lock = threading.RLock()
_started = time.time()
_path: Path | None = None
_file: int | None = None
_counted: Sequence[Counted] = ()
_block = (0, Struct(""))  # the offset of the counts, and what packs them
_length = 0


def write_counts(one: Counted | None = None) -> None:
    """Write one count, or all of them. This is a system call, so it is called at the end of a forward."""
    with _lock:
        if _file is None:
            return
        at, packed = _block
        try:
            if one is not None:
                os.pwrite(_file, b"%016x" % one.calls, one.place)
            else:
                os.pwrite(_file, packed.pack(*[counted.calls for counted in _counted]).hex().encode(), at)
        except OSError as error:
            _give_up(error)


def write(head: dict[str, Any], rows: Sequence[str], graphs: Sequence[str], silent: Sequence[str],
          counted: Sequence[Counted]) -> bool:  # fmt: skip
    """Write the file of this process anew: objects as JSON, and the counts of `counted`, rows before graphs.

    Returns False, and logs it, if the file cannot be written; the first time, NORM_PLUGIN_STRICT=1 makes it an error.
    """
    global _block, _counted, _length
    text = json.dumps({**_process(), **head}, indent=1)[:-2]
    for name, objects in (("rows", rows), ("graphs", graphs), ("silent", silent)):
        text += f',\n "{name}": [' + ",".join(f"\n  {one}" for one in objects) + "]"
    text += ',\n "numbers":'
    text += " " * (-len(text) % CELL + CELL - 1) + '"'
    packed = Struct(f">{len(counted)}Q")
    numbers = packed.pack(*[one.calls for one in counted]).hex()
    with _lock:
        first = _file is None
        try:
            data = f'{text}{numbers}"\n}}\n'.encode("ascii")
            _put(data)
        except OSError as error:
            why = _give_up(error)
            if settings.get().strict and first:
                raise ReportError(f"{why} NORM_PLUGIN_STRICT=1 forbids going on without.") from error
            return False
        _counted, _block, _length = counted, (len(text), packed), len(data)
        for i, one in enumerate(counted):
            one.place = len(text) + i * CELL
    return True


def _put(data: bytes) -> None:
    """Replace the file by a temporary one, which nobody but its owner could ever read."""
    global _path, _file
    if _path is None:
        moment = datetime.fromtimestamp(_started, timezone.utc)
        name = f"{moment:%Y%m%dT%H%M%S}-{re.sub(r'[^A-Za-z0-9.-]', '_', socket.gethostname())}-{os.getpid()}.json"
        _path = _folder(settings.get().report or "") / name
    handle, temporary = tempfile.mkstemp(prefix=f".{_path.stem}-", suffix=".tmp", dir=_path.parent)
    try:
        written = 0
        while written < len(data):
            written += os.write(handle, data[written:])
        os.replace(temporary, _path)
    except OSError:
        os.close(handle)
        Path(temporary).unlink(missing_ok=True)
        raise
    before, _file = _file, handle  # never a closed descriptor, as another thread may fork
    if before is not None:
        os.close(before)


def _folder(wanted: str) -> Path:
    folder = Path(wanted)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def is_intact() -> bool:
    """Whether the file is as it was written; True if there is none."""
    with _lock:
        if _file is None or _path is None:
            return True
        try:
            ours, there = os.fstat(_file), os.stat(_path, follow_symlinks=False)
            before_numbers = os.pread(_file, 1, _block[0] - 1)  # no quote, if the file was cut before the counts
        except OSError:
            return False
        same = (ours.st_ino, ours.st_dev) == (there.st_ino, there.st_dev)
        return same and ours.st_size == _length and before_numbers == b'"'


def unwritable(folder: str | None) -> str:
    """Why no report can be written to the folder; "" if it can, or if none is wanted.

    It is asked when a server starts, because a process writes its first report only once its model is loaded.
    """
    if not folder:
        return ""
    try:
        with tempfile.NamedTemporaryFile(dir=_folder(folder), prefix=".norm_plugin-", suffix=".tmp") as file:
            file.write(b" " * 4096)
            file.flush()
    except OSError as error:
        return _cannot(folder, error)
    return ""


def warn_if_unwritable() -> None:
    """Warn, before the model is loaded, if the report cannot be written; under NORM_PLUGIN_STRICT=1 raise."""
    wanted = settings.get()
    if why := unwritable(wanted.report):
        if wanted.strict:
            raise ReportError(f"{why} NORM_PLUGIN_STRICT=1 forbids going on without.")
        log.warning("%s", why)


def _cannot(folder: str, error: OSError) -> str:
    return (
        f"NORM_PLUGIN_REPORT={folder}: the report cannot be written: {error}. Name a folder that this user may write."
    )


def _give_up(error: OSError) -> str:
    why = _cannot(settings.get().report or "", error)
    close()
    log.warning("%s This process goes on without.", why)
    return why


def close() -> None:
    """Close the file and leave it as it is; the next write makes another."""
    global _path, _file, _counted
    with _lock:
        for one in _counted:
            one.place = -1
        before, _path, _file, _counted = _file, None, None, ()
        if before is not None:
            os.close(before)


def forked() -> None:
    """In a forked child: take a new lock, as nobody would release the old one, and leave the parent's file."""
    global _lock, _started
    _lock = threading.RLock()
    _started = time.time()
    close()


def _process() -> dict[str, Any]:
    return {
        "report": FORMAT,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": datetime.fromtimestamp(_started, timezone.utc).isoformat(timespec="seconds"),
        "command": command_line.of_process(),
        "started as": command_line.redacted(sys.argv),
        "flags": {flag.name: os.environ[flag.name] for flag in settings.FLAGS if flag.name in os.environ},
        "versions": versions.of_process(),
    }
