"""One run at a time for one engine in one folder."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from norm_plugin.patching.errors import PatchError
from norm_plugin.patching.tree import Tree

PATIENCE = 60.0


@contextmanager
def held(tree: Tree, path: str, patience: float = PATIENCE) -> Iterator[None]:
    """Hold the lock for a block of code; another run that has it is waited for. A killed run's lock is free.

    The file goes with the lock, and so does its folder if nothing else is in it.
    """
    give_up = time.monotonic() + patience
    while (handle := _taken(tree, path)) is None:
        if time.monotonic() > give_up:
            raise PatchError(
                f"another run of norm-plugin patch has held {tree.root / path} for {patience:.0f} s: wait for its end"
            )
        time.sleep(0.05)
    try:
        yield
    finally:
        with suppress(OSError, PatchError):  # what was done stays done
            tree.remove(path)
        os.close(handle)
        tree.remove_empty(os.path.dirname(path))


def _taken(tree: Tree, path: str) -> int | None:
    try:
        with tree.at(path, make=True) as (folder, name):
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            handle = os.open(name, flags, 0o644, dir_fd=folder)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(handle), os.stat(name, dir_fd=folder, follow_symlinks=False)):
                    return handle  # and not the lock of a run that has just cleaned up behind itself
            except (BlockingIOError, FileNotFoundError):
                pass
            os.close(handle)
    except FileNotFoundError:  # the folder went away in between, with the run that made it
        pass
    return None
