"""What ends a command with one line and a code of its own."""

from __future__ import annotations

from pathlib import Path

DIFFERENT, WRONG_ARGUMENT, NOT_RUN = 1, 2, 3


class CommandError(Exception):
    """The command cannot do what it was asked for; the message is all that is shown."""

    def __init__(self, message: str, code: int = NOT_RUN) -> None:
        super().__init__(message)
        self.code = code


def save(path: Path, text: str) -> None:
    """Write what a user has asked for."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:  # a full disk does not say which file it was
        raise CommandError(f"{path} cannot be written: {error.strerror}.") from error


def need_gpu() -> None:
    """For what measures one."""
    import torch

    if not torch.cuda.is_available():
        raise CommandError("there is no GPU here that torch can use.", WRONG_ARGUMENT)
