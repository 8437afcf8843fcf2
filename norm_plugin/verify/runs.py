"""Runs an engine in a child process: stock, stock again, patched. However this ends, nothing of it is left behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from norm_plugin import settings
from norm_plugin.verify import failure, outcome, supervisor
from norm_plugin.verify.outcome import Outcome

#: What an engine may want for sockets, compiled code and its log.
ROOM = 64 << 20


class EngineFailed(RuntimeError):
    """A run did not come to its end; the message has the engine's own reason."""


@contextmanager
def workplace() -> Iterator[Path]:
    """A temporary folder with room for the runs of an engine."""
    at = Path(tempfile.gettempdir())
    free = shutil.disk_usage(at).free
    if free < ROOM:
        raise EngineFailed(
            f"the temporary folder {at} has {free >> 20} MiB left, and an engine needs {ROOM >> 20}. "
            "Make room, or name another in TMPDIR."
        )
    with tempfile.TemporaryDirectory(prefix="norm-plugin-") as folder:
        yield Path(folder)


@dataclass(frozen=True)
class Plan:
    """What all runs of one verify share."""

    engine: str
    python: str
    models: Sequence[Path]
    prompts: Sequence[str | list[int]]
    folder: Path
    arguments: Sequence[str]


@dataclass(frozen=True)
class Run:
    """One run: what it is called, its flags, and whether its prompts come in the reverse order."""

    name: str
    flags: dict[str, str]
    reverse: bool = False
    arguments: Sequence[str] = field(default=())


def execute(plan: Plan, run: Run, watch: Callable[[str, float], None]) -> list[Outcome]:
    """The outcomes of all models, the answers in the order of the plan's prompts.

    `watch` is told the engine's latest line and the seconds so far.
    """
    words = run.name.replace(",", "").replace(" ", "-")
    prompts, out, log = (plan.folder / f"{words}.{end}" for end in ("prompts.json", "out.json", "log"))
    try:
        prompts.write_text(json.dumps(plan.prompts[::-1] if run.reverse else plan.prompts))
    except OSError as error:
        raise EngineFailed(
            f"the temporary folder {plan.folder.parent} cannot be written ({error.strerror}). "
            "Make room, or name another in TMPDIR."
        ) from error
    command = [
        *(plan.python, "-m", f"norm_plugin.verify.{plan.engine}_child"),
        *("--models", *map(str, plan.models), "--prompts", str(prompts), "--out", str(out)),
        *plan.arguments,
        *run.arguments,
    ]
    # engines leave sockets and files in the temporary folder
    code = _wait(command, environment(run.flags) | {"TMPDIR": str(plan.folder)}, log, watch)
    if code:
        raise EngineFailed(_failure(plan, run, code, log, out))
    try:
        found = outcome.read(out)
    except (OSError, ValueError) as error:
        raise EngineFailed(f"the answers of {plan.engine} in {out} cannot be read: {error}") from error
    if run.reverse:
        for one in found:
            one.answers.reverse()
    return found


def environment(flags: dict[str, str]) -> dict[str, str]:
    """The environment of a run: of our flags only its own, so that stock is stock."""
    ours = {flag.name for flag in settings.FLAGS}
    return {**{name: value for name, value in os.environ.items() if name not in ours}, **flags}


def _wait(command: list[str], environ: dict[str, str], log: Path, watch: Callable[[str, float], None]) -> int:
    begin = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, supervisor.__file__, *command],
            env=environ, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            while True:
                try:
                    return process.wait(0.5)
                except subprocess.TimeoutExpired:
                    watch(_last_line(log), time.monotonic() - begin)
        finally:  # however this ends: the supervisor kills what is left, and waits for it
            if process.stdin is not None:
                process.stdin.close()
            process.wait()


def _last_line(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = file.read().decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _failure(plan: Plan, run: Run, code: int, log: Path, out: Path) -> str:
    done = len(outcome.read(out)) if out.exists() else 0
    model = plan.models[min(done, len(plan.models) - 1)]
    said = "\n".join(f"  | {line}" for line in failure.reason(log.read_text(errors="replace")).splitlines())
    full = shutil.disk_usage(plan.folder).free < 1 << 20
    return (
        f"{plan.engine} did not finish the run '{run.name}' of {model} (exit code {code}). It said:\n{said}\n"
        + f"The temporary folder {plan.folder.parent} is full. " * full
        + failure.kept(log, plan.engine)
    )
