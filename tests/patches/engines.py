"""The real engines, from a patched copy of their package in the environments that scripts/engine_* make."""

from __future__ import annotations

import functools
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from norm_plugin.patching import site as sites
from norm_plugin.patching import work
from norm_plugin.tiny_models import checkpoint
from norm_plugin.verify.outcome import Outcome
from tests.engines.runs import Run, python

STAND_INS = Path(__file__).with_name("stand_ins")


@functools.cache
def folder(engine: str) -> Path:
    """For all files of this session with this engine."""
    return Path(tempfile.mkdtemp(prefix=f"{engine}-patches."))


def patched(engine: str, folder: Path, names: Sequence[str]) -> Path:
    """A folder with the engine's package, linked from its environment and then patched: the environment stays clean."""
    packages = Path(
        subprocess.run(
            [python(engine), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            stdout=subprocess.PIPE, text=True, check=True,
        ).stdout.strip()
    )  # fmt: skip
    folder.mkdir()
    of_engine = [packages / engine, *packages.glob(f"{engine}-*.dist-info")]
    for source in of_engine:  # a link where the file systems are one; else a copy
        linked = subprocess.run(["cp", "-al", source, folder], capture_output=True)
        if linked.returncode:
            subprocess.run(["cp", "-a", source, folder], check=True)
    work.apply(sites.find(engine, folder), names)
    return folder


def run(engine: str, models: Sequence[str], dtype: str, start: Sequence[str], **flags: str) -> Run:
    """Tiny models in a process that `start` tells Python to run; nothing of it is interpreted but by stand-ins."""
    paths = [checkpoint.make(name) for name in models]
    return Run(engine, paths, {"TRITON_INTERPRET": "0", **flags}, "--dtype", dtype, child=tuple(start))


def same_tokens(one: Outcome, other: Outcome) -> bool:
    return [answer.tokens for answer in one.answers] == [answer.tokens for answer in other.answers]
