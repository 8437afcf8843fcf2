"""One run at a time for one engine in one folder."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from norm_plugin.patching.errors import PatchError

PATIENCE = 60.0


@contextmanager
def held(path: Path, patience: float = PATIENCE) -> Iterator[None]:
    """Hold the lock for a block of code; another run that has it is waited for. A killed run's lock is free."""
    give_up = time.monotonic() + patience
    while (handle := _taken(path)) is None:
        if time.monotonic() > give_up:
            raise PatchError(f"another run of norm-plugin patch has held {path} for {patience:.0f} s: wait for its end")
        time.sleep(0.05)
    try:
        yield
    finally:
        os.close(handle)


def _taken(path: Path) -> int | None:
    try:
        path.parent.mkdir(exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except (FileNotFoundError, FileExistsError):  # the folder went away in between, with the run that made it
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(handle), path.stat()):
            return handle  # and not the lock of a run that has just cleaned up behind itself
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(handle)
    return None
