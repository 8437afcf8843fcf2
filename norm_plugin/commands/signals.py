"""Makes a signal end a command as an error does: with temporary folders removed, and processes waited for."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ENDING = (signal.SIGTERM, signal.SIGHUP)


class Ended(SystemExit):
    """A signal has ended the command. The exit code is the one that shells use for it."""

    def __init__(self, number: int) -> None:
        self.exit_code = 128 + number
        super().__init__(self.exit_code)
        self.name = signal.Signals(number).name


@contextmanager
def unwound() -> Iterator[None]:
    """Raise `Ended` if a signal comes during a block. A signal that is ignored, as with nohup, stays ignored."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set a handler
        yield
        return
    before = {number: handler for number in ENDING if (handler := signal.getsignal(number)) == signal.SIG_DFL}

    def end(number: int, frame: FrameType | None) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)  # a second signal would interrupt the cleaning up
        raise Ended(number)

    try:
        for number in before:
            signal.signal(number, end)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
