"""A command that a signal ends: verify's folder and its processes go, and the exit code is the shell's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from norm_plugin.commands.signals import Ended, unwound
from tests.verify.test_supervisor import gone, marked

#: What verify takes for a Python with an engine. It says that nothing is missing; as the engine it starts a process in
#: a session of its own, leaves a file in verify's folder, and waits.
ENGINE = """#!/bin/sh
test "$1" = -c && exit 0
setsid sleep 600 &
touch "$TMPDIR/left-by-the-engine"
exec sleep 600
"""

COMMAND = "import sys; from norm_plugin.cli import main; sys.exit(main())"


def until(reached: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 300
    while not reached():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.1)


def verify(tmp_path: Path, mark: str) -> subprocess.Popen[bytes]:
    """`norm-plugin verify` with an engine in its first run; its temporary folder is tmp_path/tmp."""
    (tmp_path / "tmp").mkdir()
    (tmp_path / "engine").write_text(ENGINE)
    (tmp_path / "engine").chmod(0o755)
    environ = {**os.environ, "MARK": mark, "TMPDIR": str(tmp_path / "tmp")}
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, "verify", "--engine", "vllm", "--python", str(tmp_path / "engine")],
        env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    until(lambda: len(marked(mark)) >= 5, process)  # verify, two leashes, the engine and what it has started
    until(lambda: bool(list((tmp_path / "tmp").glob("norm-plugin-*/left-by-the-engine"))), process)
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_verify_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    mark = f"ended-{uuid.uuid4()}"
    process = verify(tmp_path, mark)
    process.send_signal(number)
    process.send_signal(number)  # as an impatient supervisor does
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert said.decode().splitlines()[-1] == f"norm-plugin verify: ended by {number.name}."
    assert gone(mark)
    assert not list((tmp_path / "tmp").glob("norm-plugin-*"))


def test_what_nohup_has_is_kept() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with unwound():
            signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_handlers_of_before_are_put_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]
    with pytest.raises(Ended) as end, unwound():
        signal.raise_signal(signal.SIGTERM)
    assert (end.value.code, end.value.name) == (128 + 15, "SIGTERM")
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)] == before
