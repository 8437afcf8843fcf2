"""The supervisor: what it runs ends with whoever holds it, however that ends, and wherever the processes have gone."""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from norm_plugin.verify import supervisor

#: A child, a grandchild in a session of its own, and an orphan that init would get.
FAMILY = """
import os, subprocess, sys, time
sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
subprocess.Popen(sleep, start_new_session=True)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execv(sys.executable, sleep)
    os._exit(0)
os.wait()
print("ready", flush=True)
time.sleep(float(sys.argv[1]))
sys.exit(int(sys.argv[2]))
"""


def marked(mark: str) -> set[int]:
    found = set()
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in environ.read_bytes():
                found.add(int(environ.parent.name))
        except OSError:
            continue
    return found


def start(mark: str, seconds: float, code: int = 0) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, supervisor.__file__, sys.executable, "-c", FAMILY, str(seconds), str(code)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "MARK": mark}, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    end = time.monotonic() + 20
    while (found := len(marked(mark))) != 5 and time.monotonic() < end:  # the one in between is on its way out
        time.sleep(0.05)
    assert found == 5, "the two leashes, the command, and two that have left its session"
    return process


def gone(mark: str) -> bool:
    end = time.monotonic() + 20
    while marked(mark) and time.monotonic() < end:
        time.sleep(0.05)
    return not marked(mark)


def close(process: subprocess.Popen[bytes]) -> None:
    """What happens when the parent dies, in whatever way."""
    assert process.stdin is not None
    process.stdin.close()


@pytest.mark.parametrize(
    "stop",
    [close, subprocess.Popen.terminate, lambda process: process.send_signal(signal.SIGINT)],
    ids=["the parent dies", "SIGTERM", "SIGINT"],
)
def test_nothing_outlives_it(stop: Callable[[subprocess.Popen[bytes]], None]) -> None:
    mark = f"supervisor-{uuid.uuid4()}"
    process = start(mark, 600)
    stop(process)
    assert process.wait(20) != 0
    assert gone(mark)


def second(process: subprocess.Popen[bytes]) -> int:
    """A supervisor inside a supervisor."""
    (pid,) = supervisor.children(process.pid)
    assert supervisor.INNER.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    return pid


@pytest.mark.parametrize("which", ["the outer", "the inner", "the outer and its group"])
def test_nothing_outlives_a_killed_leash(which: str) -> None:
    """It cannot clean up, and what has left its session is nobody's child then."""
    mark = f"supervisor-{uuid.uuid4()}"
    process = start(mark, 600)
    if which == "the outer and its group":
        os.killpg(process.pid, signal.SIGKILL)
    else:
        os.kill(process.pid if which == "the outer" else second(process), signal.SIGKILL)
    assert gone(mark)
    assert process.wait(20) != 0


def test_the_command_ends_by_itself() -> None:
    mark = f"supervisor-{uuid.uuid4()}"
    process = start(mark, 0.5, code=7)
    assert process.wait(30) == 7
    assert gone(mark), "what the command left behind"


def test_a_command_that_is_killed_has_the_shells_code() -> None:
    process = subprocess.Popen(
        [sys.executable, supervisor.__file__, sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"],
        stdin=subprocess.PIPE,
    )
    assert process.wait(20) == 128 + 9
