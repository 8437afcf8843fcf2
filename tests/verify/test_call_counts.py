"""Every call is counted by layer, in a report file that is whole at every moment, whatever ends a process."""

import gc
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import norm_plugin
from norm_plugin import dispatch, settings
from norm_plugin.engines import call_counts, graphs, report_file


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    dispatch.reset()
    call_counts.reset()
    yield
    call_counts.reset()
    dispatch.reset()


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A report that is wanted."""
    with settings.override(report=str(tmp_path / "report"), backend="native"):
        yield tmp_path / "report"


class RMSNorm(nn.Module):
    def __init__(self, width: int, weight: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width)) if weight else None

    def forward(self, x: torch.Tensor, reason: str = "") -> torch.Tensor:
        call_counts.count("rmsnorm", x, self.weight, reason)
        return norm_plugin.rmsnorm(x, self.weight)


KIND = f"{RMSNorm.__module__}.RMSNorm"


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = RMSNorm(64), RMSNorm(64), RMSNorm(32)
        self.linear = nn.Linear(4, 4)


def one(folder: Path) -> dict[str, Any]:
    (process,) = report_file.read(folder)
    return process


def row(process: dict[str, Any], layer: str) -> dict[str, Any]:
    (found,) = [row for row in process["rows"] if row["layer"] == layer]
    return found


def test_calls_by_layer_op_and_reason() -> None:
    model = Model()
    call_counts.name_layers(model)
    with torch.no_grad():
        for _ in range(3):
            model.first(torch.ones(2, 64))
        model.second(torch.ones(2, 64), reason="too strange")
    assert call_counts.calls("rmsnorm") == 3
    assert call_counts.calls("rmsnorm", "too strange") == 1
    assert call_counts.calls("rmsnorm", None) == 4
    assert [(r.layer, r.reason, r.calls) for r in call_counts.rows()] == [
        (("first", KIND), "", 3),
        (("second", KIND), "too strange", 1),
    ]
    (silent,) = [fact for fact in call_counts.facts() if not fact["op"]]
    assert (silent["layer"], silent["calls"], silent["reason"]) == ("third", 0, "not called so far")


def test_nothing_is_written_unless_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    original = torch.cuda.CUDAGraph.replay
    model = Model()
    call_counts.name_layers(model)
    model.first(torch.ones(2, 64))
    assert list(tmp_path.iterdir()) == []
    assert torch.cuda.CUDAGraph.replay is original


def test_the_report_says_what_ran_each_layer(folder: Path) -> None:
    model = Model()
    call_counts.name_layers(model)
    with torch.no_grad():
        for rows in (1, 2, 3):
            model.first(torch.ones(rows, 64, dtype=torch.bfloat16))
        model.second(torch.ones(2, 128)[:, ::2].as_strided((2, 64), (128, 1)))
        model.third(torch.ones(2, 32), reason="too strange")
    process = one(folder)
    assert process["pid"] == os.getpid()
    assert "pytest" in process["command"]
    first = row(process, "first")
    assert (first["class"], first["op"], first["calls"], first["reason"]) == (KIND, "rmsnorm", 3, "")
    assert (first["width"], first["dtype"], first["strides"]) == (64, "bfloat16", [[64, 1]])
    assert first["implementations"] == [
        {"backend": "native", "because": "the native backend was asked for", "numerics": "fp32", "configuration": ""}
    ]
    assert row(process, "second")["strides"] == [[128, 1]]
    third = row(process, "third")
    assert (third["reason"], third["calls"], third["implementations"]) == ("too strange", 1, [])


def test_a_layer_that_nobody_called_is_in_the_report(folder: Path) -> None:
    model = Model()
    model.bare = RMSNorm(8, weight=False)
    call_counts.name_layers(model)
    model.first(torch.ones(2, 64))
    silent = {r["layer"] for r in one(folder)["rows"] if not r["op"]}
    assert silent == {"second", "third", "bare"}
    model.bare(torch.ones(2, 8))
    assert {r["layer"] for r in one(folder)["rows"] if not r["op"]} == {"second", "third"}


def test_the_file_is_json_at_every_moment_and_never_counts_back(tmp_path: Path) -> None:
    program = (
        "import torch\nfrom norm_plugin.engines import call_counts\n"
        "weights = [torch.ones(n) for n in range(1, 40)]\n"
        "for i in range(4000):\n"
        "    for w in weights[: 1 + i // 100]:\n"
        "        call_counts.count('rmsnorm', w, w)\n"
    )
    worker = start(program, tmp_path)
    seen = 0
    looks = 0
    while worker.poll() is None:
        for path in tmp_path.glob("*.json"):
            process = json.loads(path.read_text())
            numbers = [int(digits, 16) for digits in re.findall(".{16}", process["numbers"])]
            assert len(numbers) == len(process["rows"])
            calls = sum(numbers)
            assert calls >= seen
            seen = calls
            looks += 1
    assert worker.returncode == 0
    assert looks > 20
    assert sum(r["calls"] for r in one(tmp_path)["rows"]) == sum(min(39, 1 + i // 100) for i in range(4000))
    assert list(tmp_path.glob(".*")) == []


def start(program: str, folder: Path) -> subprocess.Popen[str]:
    environ = {**os.environ, "NORM_PLUGIN_REPORT": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", program], env=environ, stdout=subprocess.PIPE, text=True)


def test_a_killed_process_leaves_every_call(tmp_path: Path) -> None:
    program = (
        "import os, signal, torch\nfrom norm_plugin.engines import call_counts\n"
        "w = torch.ones(8)\n"
        "for i in range(1237):\n    call_counts.count('rmsnorm', w, w)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    worker = start(program, tmp_path)
    assert worker.wait(60) == -signal.SIGKILL
    (counted,) = one(tmp_path)["rows"]
    assert counted["calls"] == 1237


def test_a_forked_child_has_a_file_and_counts_of_its_own(tmp_path: Path) -> None:
    program = (
        "import os, torch\nfrom norm_plugin.engines import call_counts\n"
        "w = torch.ones(8)\n"
        "call_counts.count('rmsnorm', w, w)\n"
        "child = os.fork()\n"
        "for i in range(3 if child else 5):\n    call_counts.count('rmsnorm', w, w)\n"
        "child and os.waitpid(child, 0)\n"
    )
    worker = start(program, tmp_path)
    assert worker.wait(60) == 0
    processes = {process["pid"]: process["rows"][0]["calls"] for process in report_file.read(tmp_path)}
    assert processes.pop(worker.pid) == 4
    assert list(processes.values()) == [5]


class FakeGraph:
    """What torch.cuda.CUDAGraph has, for its calls; that a real one is followed, test_graphs.py shows on a GPU."""

    def capture_begin(self) -> None: ...

    def capture_end(self) -> None: ...

    def replay(self) -> str:
        return "replayed"


def test_captured_calls_are_counted_at_each_replay(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    model = Model()
    call_counts.name_layers(model)
    model.first(torch.ones(2, 64))  # warming up
    one_layer, two_layers, same_layer = FakeGraph(), FakeGraph(), FakeGraph()
    for graph, layers in (
        (one_layer, ["first"]),
        (two_layers, ["first", "second", "second"]),
        (same_layer, ["first"]),
    ):
        graph.capture_begin()
        for name in layers:
            getattr(model, name)(torch.ones(2, 64))
        graph.capture_end()
    assert row(one(folder), "first")["calls"] == 1, "a capture runs nothing"
    for _ in range(10):
        assert one_layer.replay() == "replayed"
    for _ in range(100):
        two_layers.replay()
    same_layer.replay()
    process = one(folder)
    first, second = row(process, "first"), row(process, "second")
    assert (first["calls"], first["eager"], first["replayed"]) == (1 + 10 + 100 + 1, 1, 111)
    assert (second["calls"], second["eager"], second["replayed"]) == (200, 0, 200)
    assert second["implementations"], "captured layers say what runs them"
    assert len(process["graphs"]) == 2
    assert call_counts.calls("rmsnorm") == 312
    call_counts.reset()
    assert FakeGraph.replay(one_layer) == "replayed"
    assert graphs.captured() == ()


def test_endless_new_weights_do_not_fill_the_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call_counts, "MOST_ROWS", 5)
    kept = [torch.ones(4) for _ in range(9)]
    for weight in kept:
        call_counts.count("rmsnorm", weight, weight)
    assert len(call_counts.rows()) == 6
    assert sum(r["calls"] for r in one(folder)["rows"]) == 9


def test_a_report_that_cannot_be_written_is_said_once_and_raised_when_strict(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    w = torch.ones(4)
    with settings.override(report=str(tmp_path / "file")):
        for _ in range(4):
            call_counts.count("rmsnorm", w, w)
        assert call_counts.calls("rmsnorm") == 4
        (line,) = caplog.messages
        assert "NORM_PLUGIN_REPORT" in line
        assert str(tmp_path / "file") in line
    call_counts.reset()
    with (
        settings.override(report=str(tmp_path / "file"), strict=True),
        pytest.raises(report_file.ReportError, match="NORM_PLUGIN_STRICT=1"),
    ):
        call_counts.count("rmsnorm", w, w)


ADDED = ["count", "data_ptr", "get"]


def test_what_a_count_costs() -> None:
    """It finds its row and adds one. Calls 1, 2, 4, 8, ... look at their input as well."""
    x, w = torch.ones(4, 64), torch.ones(64)
    seen = [called_by(lambda: call_counts.count("rmsnorm", x, w)) for _ in range(1000)]
    assert [number for number, functions in enumerate(seen, 1) if functions != ADDED] == [1 << n for n in range(10)]


def test_what_a_count_costs_where_there_is_a_report(folder: Path) -> None:
    """In the middle of a forward it notes whose turn it was: no lock, no file."""
    x, first, last = torch.ones(4, 64), torch.ones(64), torch.ones(64)
    for number in range(1, 100):
        functions = called_by(lambda: call_counts.count("rmsnorm", x, first))
        call_counts.count("rmsnorm", x, last)
        assert number in (1, 2) or number & (number - 1) == 0 or functions == [*ADDED, "called"]


def called_by(run: Callable[[], None]) -> list[str]:
    """The names of all functions, of Python and of C, that `run` calls."""
    names: list[str] = []

    def note(frame: FrameType, event: str, function: Any) -> None:
        if event == "call":
            names.append(frame.f_code.co_name)
        elif event == "c_call":
            names.append(function.__name__)

    gc.disable()  # what is collected meanwhile is none of its calls
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
        gc.enable()
    return names[1:-1]  # without `run` itself, and the end of noting
