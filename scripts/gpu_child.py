"""A child process with one engine, which gets orders and answers them: for the scripts that drive engines on a GPU.

Orders go to its standard input and answers come from a file descriptor, one JSON a line; what it prints is its log.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for the scripts that import this first


def plugin_folder(work: Path) -> Path:
    """Engines find plugins by metadata, which a checkout has not."""
    metadata = work / "plugin" / "norm_plugin-0.dist-info"
    metadata.mkdir(parents=True, exist_ok=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: norm-plugin\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nnorm_plugin = norm_plugin.engines.vllm:register\n"
        "[sglang.srt.plugins]\nnorm_plugin = norm_plugin.engines.sglang:register\n"
    )
    return metadata.parent


def fastest(shots: list[tuple[float, float]]) -> float:
    """The seconds of the steps that a long answer has more than a short one, from several shots of (short, long). The
    fastest of each: the fastest difference would be that of a short answer that took too long."""
    short, long = zip(*shots, strict=True)
    return min(long) - min(short)


class Child:
    """`script` is run with what is wanted of it and the number of the descriptor, for at most so many seconds."""

    def __init__(self, script: str, name: str, work: Path, wanted: Any, env: dict[str, str], seconds: float) -> None:
        self.name, self.log = name, work / f"{name}.log"
        paths = [str(plugin_folder(work)), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        reading, writing = os.pipe()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "scripts" / script), json.dumps(wanted), str(writing)],
                env=env | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}, stdin=subprocess.PIPE,
                stdout=log, stderr=log, pass_fds=[writing], cwd=ROOT, text=True, start_new_session=True,
            )  # fmt: skip
        os.close(writing)
        self.answers = os.fdopen(reading)
        self.watch = threading.Timer(seconds, self.kill)
        self.watch.start()

    def kill(self) -> None:
        """It, and every process that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def answer(self) -> Any:
        """The next; a RuntimeError with its last words where it has ended."""
        line = self.answers.readline()
        if not line:
            self.process.wait()
            raise RuntimeError(f"{self.name} ended with {self.process.returncode}: {self.last_words()}")
        return json.loads(line)

    def ask(self, do: str, **order: Any) -> Any:
        """An order, and its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **order}) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def last_words(self) -> str:
        """Its errors, and the end of its log."""
        lines = self.log.read_text(errors="replace").splitlines()
        errors = [line for line in lines if "Error" in line][-4:]
        return " | ".join([*errors, *lines[-3:]])[-1500:]

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.watch.cancel()
        assert self.process.stdin is not None
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            self.process.stdin.close()
            self.process.wait(20)
        self.kill()
        self.process.wait()
        self.answers.close()
