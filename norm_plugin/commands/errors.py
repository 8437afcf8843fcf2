"""The error that ends a command with one line and an exit code."""

from __future__ import annotations

from pathlib import Path

#: Exit codes. 0: all is well. 1: it was tested and is not. 2: it could not be tested or done, as with a wrong argument.
DIFFERENT, NOT_RUN = 1, 2
WRONG_ARGUMENT = NOT_RUN

EXIT_CODES = "exit codes: 0 done, 2 not done, with the reason on standard error"


class CommandError(Exception):
    """The command cannot do what it was asked to do. Only the message is shown."""

    def __init__(self, message: str, code: int = NOT_RUN) -> None:
        super().__init__(message)
        self.code = code


def save(path: Path, text: str) -> None:
    """Write a file that the user has asked for."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:  # a full disk does not say which file it was
        raise CommandError(f"{path} cannot be written: {error.strerror}.") from error


def need_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        raise CommandError("there is no GPU here that torch can use.", WRONG_ARGUMENT)
