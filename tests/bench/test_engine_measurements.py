"""The measurements of engines, on a fake engine: what they ask, what they keep, and what fails."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FAKE = ROOT / "tests" / "verify" / "fake_engine"


def measured(what: str, folder: Path, *words: str, **more: str) -> tuple[int, list[dict[str, Any]], str]:
    """The exit code, the results, and what was printed."""
    file = folder / "found.json"
    command = [sys.executable, "-m", f"benchmarks.{what}", "vllm", "--device", "cpu", "--json", str(file), *words]
    environment = {**os.environ, "PYTHONPATH": str(FAKE), "TMPDIR": str(folder), **more}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    kept = json.loads(file.read_text()) if file.exists() else {"results": []}
    assert set(kept) >= {"date", "about", "results"}, done.stderr
    return done.returncode, kept["results"], done.stdout + done.stderr


def test_the_same_output_is_judged_as_verify_does(tmp_path: Path) -> None:
    code, (found,), said = measured("same_output", tmp_path, "--models", "tiny:llama", "--modes", "eager")
    assert code == 0, said
    assert (found["engine"], found["model"], found["mode"]) == ("vllm", "tiny:llama", "eager")
    assert found["verdict"] == "nothing was patched", "an engine that repeats itself, with nothing of ours"
    assert found["floor"] == found["patched"] == {"max": 0, "mean": 0, "kl": 0, "agreement": 1, "diverged": 0}
    assert not found["passed"]


def test_a_later_run_replaces_what_it_measures_again(tmp_path: Path) -> None:
    of_before = {"part": "speed", "engine": "vllm", "mode": "eager", "scope": "eager", "decode": {}}
    rows = [of_before | {"model": model} for model in ("tiny:llama", "tiny:gpt2")]
    (tmp_path / "found.json").write_text(json.dumps({"results": rows}))
    words = ("--modes", "eager", "--repeats", "2", "--shots", "2", "--models", "tiny:llama")
    code, (kept, new), said = measured("speed", tmp_path, *words)
    assert code == 0, said
    assert kept == rows[1]
    assert new["model"] == "tiny:llama"
    assert set(new["decode"]) == {"1", "2"}
    assert len(new["decode"]["1"]["stock"]) == len(new["prefill"]["1x32"]["patched"]) == 2


def test_an_engine_that_fails_is_kept_with_its_reason(tmp_path: Path) -> None:
    code, (found,), _ = measured(
        "same_output", tmp_path, "--models", "tiny:llama", "--modes", "eager", FAKE_VLLM="fails"
    )
    assert code == 1
    assert "KeyError: 'sliding_window" in found["error"]
    assert "verdict" not in found


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--models", "tiny:llama", "--seconds", "20"], "no time left for tiny:llama, eager"),
        (["--models", "tiny:llama", "tiny:lama", "llama"], "--models tiny:lama llama: there are tiny:llama, "),
    ],
)
def test_what_cannot_be_measured_is_not_started(words: list[str], says: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.same_output", "vllm", "--device", "cpu", "--modes", "eager", *words]
    environment = {**os.environ, "PYTHONPATH": str(FAKE), "OUT": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert says in done.stdout + done.stderr
    assert not (tmp_path / "same_output.json").exists()


def test_an_interrupt_leaves_no_engine_behind(tmp_path: Path) -> None:
    words = ["--models", "tiny:llama", "--modes", "eager", "--json", str(tmp_path / "found.json")]
    command = [sys.executable, "-m", "benchmarks.same_output", "vllm", "--device", "cpu", *words]
    environment = {**os.environ, "PYTHONPATH": str(FAKE), "TMPDIR": str(tmp_path), "FAKE_VLLM": "waits"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL) as running:
        while not any("waiting" in log.read_text() for log in tmp_path.glob("*/*/log")):
            assert running.poll() is None
            time.sleep(0.5)
        assert len(engines(tmp_path)) == 1
        running.send_signal(signal.SIGINT)
    assert running.returncode not in (0, 1)
    assert not engines(tmp_path)


def engines(folder: Path) -> list[Path]:
    """The engine processes that have this folder in their command."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            command = path.read_bytes()
            if b"benchmarks.engine_child" in command and str(folder).encode() in command:
                found.append(path)
    return found
