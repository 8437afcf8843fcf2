"""Runs of real engines for the tests: tiny models, and what they answer, stock and patched, in child processes."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from norm_plugin.tiny_models import checkpoint
from norm_plugin.verify.outcome import Outcome, read

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = [[72, 101, 108, 108, 111, 32, 119], [84, 104, 101], list(range(40, 75))]
TOKENS = 8
STOCK: Mapping[str, str] = {}
NATIVE = {"NORM_PLUGIN": "native"}
SECONDS = 900


@functools.cache
def python(engine: str) -> str:
    """The Python of the engine's environment, which is made if it is not there."""
    made = subprocess.run([ROOT / "scripts" / f"engine_{engine}"], stdout=subprocess.PIPE, text=True, check=True)
    return made.stdout.split()[-1]


@functools.cache
def folder() -> Path:
    """For all files of this session."""
    return Path(tempfile.mkdtemp(prefix="engine-tests."))


def model(name: str, **changes: Any) -> Path:
    """A tiny model; with changes to its config, a copy that is named after them."""
    made = checkpoint.make(name)
    if not changes:
        return made
    place = folder() / "-".join([name, *(f"{key}={value}" for key, value in changes.items())])
    if not place.exists():
        shutil.copytree(made, place)
        config = json.loads((place / "config.json").read_text())
        (place / "config.json").write_text(json.dumps(config | changes))
    return place


def environment(flags: Mapping[str, str]) -> dict[str, str]:
    """This one's, with these flags of ours and no others."""
    ours = ("NORM_PLUGIN", "USE_NATIVE", "SGLANG_", "VLLM_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    return {**kept, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **flags}


def free_port() -> int:
    """Nobody's at this moment."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
    return port


class Run:
    """A child process that runs models one after another; `child` is what Python is told to run."""

    def __init__(
        self,
        engine: str,
        models: list[Path],
        flags: Mapping[str, str],
        *options: str,
        child: tuple[str, ...] = (),
    ) -> None:
        place = Path(tempfile.mkdtemp(dir=folder()))
        (place / "prompts").write_text(json.dumps(PROMPTS))
        self.out, self.log = place / "out", place / "log"
        command = [python(engine), *(child or ("-m", f"norm_plugin.verify.{engine}_child")), "--models"]
        command += [*map(str, models), "--prompts", str(place / "prompts"), "--out", str(self.out)]
        command += ["--max-tokens", str(TOKENS), *options]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, env=environment(flags), stdout=log, stderr=log, cwd=place, start_new_session=True
            )

    def outcomes(self) -> list[Outcome]:
        """What it wrote; its last lines where it failed."""
        try:
            status = self.process.wait(SECONDS)
        finally:
            with contextlib.suppress(ProcessLookupError):  # the engine's processes as well
                os.killpg(self.process.pid, signal.SIGKILL)
        assert status == 0, self.log.read_text()[-3000:]
        return read(self.out)


def side_by_side(
    engine: str, models: list[Path], flags: Mapping[str, str], *options: str
) -> dict[str, tuple[Outcome, Outcome]]:
    """Stock and patched of each model, run at the same time."""
    stock, patched = Run(engine, models, STOCK, *options), Run(engine, models, flags, *options)
    return {one.model: (one, other) for one, other in zip(stock.outcomes(), patched.outcomes(), strict=True)}


def furthest(one: Outcome, other: Outcome) -> float:
    """The largest difference of a chosen token's logprob."""
    pairs = zip(one.answers, other.answers, strict=True)
    return max(abs(a - b) for x, y in pairs for a, b in zip(x.logprobs, y.logprobs, strict=True))


def calls(outcome: Outcome, process: str = "") -> dict[tuple[str, str], int]:
    """Calls by op and reason, in the processes whose command has `process` in it."""
    found: dict[tuple[str, str], int] = {}
    for row in outcome.rows:
        if row["calls"] and process in row.get("process", ""):
            key = row["op"], row["reason"]
            found[key] = found.get(key, 0) + row["calls"]
    return found
