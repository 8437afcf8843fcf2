"""The real engines, from a patched copy of their package in the environments that scripts/engine_* make."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from norm_plugin.patching import site as sites
from norm_plugin.patching import work
from norm_plugin.verify import tiny
from norm_plugin.verify.outcome import Outcome, read

ROOT = Path(__file__).resolve().parents[2]
STAND_INS = Path(__file__).with_name("stand_ins")
PROMPTS = [[72, 101, 108, 108, 111, 32, 119], [84, 104, 101], list(range(40, 75))]
TOKENS = 8
SECONDS = 900
OURS = ("NORM_PLUGIN", "USE_NATIVE", "VLLM_", "SGLANG_", "TRITON_", "PYTHONPATH")


@functools.cache
def python(engine: str) -> Path:
    """The Python of the engine's environment, which is made if it is not there."""
    made = subprocess.run([ROOT / "scripts" / f"engine_{engine}"], stdout=subprocess.PIPE, text=True, check=True)
    return (ROOT / made.stdout.split()[-1]).absolute()


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


class Run:
    """A child process that runs models one after another."""

    def __init__(
        self, engine: str, models: Sequence[str], place: Path, dtype: str, start: Sequence[str], **flags: str
    ) -> None:
        place.mkdir()
        (place / "prompts").write_text(json.dumps(PROMPTS))
        self.out, self.log = place / "out", place / "log"
        command = [str(python(engine)), *start, "--models", *(str(tiny.make(name)) for name in models)]
        command += ["--prompts", str(place / "prompts"), "--out", str(self.out)]
        command += ["--dtype", dtype, "--max-tokens", str(TOKENS)]
        kept = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, env={**kept, "OMP_NUM_THREADS": "1", **flags}, stdout=log, stderr=log, cwd=place
            )

    def outcomes(self) -> list[Outcome]:
        """What it wrote; its last lines where it failed."""
        try:
            status = self.process.wait(SECONDS)
        finally:
            self.process.kill()
        assert status == 0, self.log.read_text()[-3000:]
        return read(self.out)


def furthest(one: Outcome, other: Outcome) -> float:
    """The largest difference of a chosen token's logprob."""
    pairs = zip(one.answers, other.answers, strict=True)
    return max(abs(a - b) for x, y in pairs for a, b in zip(x.logprobs, y.logprobs, strict=True))


def same_tokens(one: Outcome, other: Outcome) -> bool:
    return [answer.tokens for answer in one.answers] == [answer.tokens for answer in other.answers]
