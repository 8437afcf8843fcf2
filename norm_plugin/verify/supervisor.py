"""Runs a command, and kills all of its processes when this process or the one that holds its standard input ends.

    python supervisor.py COMMAND...

An engine starts processes in sessions of their own. Here they stay children of this one, however they were started,
and all are killed when the command ends, when this process is told to end, or when standard input is closed, which
happens when its parent dies in whatever way. It is run as a file, because importing norm_plugin takes seconds.

It runs twice, one inside the other, because a killed process cannot clean up: whichever of the two is killed, the
other one ends all that is left.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
POLL_SECONDS = 0.1
INNER = "--inner"


def prctl(option: int, value: int) -> None:
    """Linux only: elsewhere, processes that leave the process group are left behind."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def children(parent: int) -> list[int]:
    """The processes whose parent this is."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(stat.parent.name))
    return found


def end(child: subprocess.Popen[bytes]) -> None:
    """Kill the command and whatever it has started; those that lose their parent become children of this process."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    while True:
        for pid in children(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            pid, status = os.waitpid(-1, 0)
        except ChildProcessError:
            return
        if pid == child.pid and child.returncode is None:
            child.returncode = os.waitstatus_to_exitcode(status)


def inner(command: list[str]) -> subprocess.Popen[bytes]:
    """The second supervisor, which must outlive this one: it holds the command, and this one holds its input."""
    return subprocess.Popen([sys.executable, __file__, INNER, *command], stdin=subprocess.PIPE, start_new_session=True)


def started(command: list[str]) -> subprocess.Popen[bytes]:
    """The command, in a session of its own, which dies with this process."""
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: prctl(PR_SET_PDEATHSIG, signal.SIGKILL),
    )


def main(arguments: list[str]) -> int:
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))
    child = started(arguments[1:]) if arguments[0] == INNER else inner(arguments)
    try:
        while child.poll() is None:
            held, _, _ = select.select([sys.stdin], [], [], POLL_SECONDS)
            if held and not os.read(sys.stdin.fileno(), 1):
                return 1
    finally:
        end(child)
    code = child.returncode or 0
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
