"""Other processes that patch: some are killed, at a step of their choice."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from norm_plugin.patching import PatchError

#: What changes a file system, as sys.addaudithook tells it. os.replace and Path.rename are both os.rename. A path that
#: is not absolute is a name in a folder that is open, as all are that the patches write.
CHANGES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")
REFUSED = 3


def in_a_process(
    do: Callable[[], Any], kill_at: int = 0, under: Path | None = None, with_signal: int = signal.SIGKILL
) -> int:
    """The exit status of a process that does this; -9 if it killed itself before its nth change `under` a folder."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        if kill_at:
            _kill_at(kill_at, str(under), with_signal)
        do()
        status = 0
    except PatchError:
        status = REFUSED
    except SystemExit as end:
        status = int(end.code or 0)
    finally:
        os._exit(status)


def _kill_at(step: int, under: str, with_signal: int) -> None:
    seen = 0

    def watch(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        if event not in CHANGES or (os.path.isabs(str(args[0])) and under not in str(args[0])):
            return
        if event == "open" and not (isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        seen += 1
        if seen == step:
            signal.raise_signal(with_signal)

    sys.addaudithook(watch)
