"""Tuning with given times: which entry is chosen, and what `norm-plugin tune` writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich", reason="the command line prints with rich")
pytest.importorskip("triton", reason="what is tuned are Triton kernels")

from norm_plugin import cli
from norm_plugin.bench import tune, tune_backward
from norm_plugin.bench.tuning import Measured
from norm_plugin.kernels import backward_configs, configs, launch
from norm_plugin.kernels.configs import Tables

GPU = "a GPU that has no table"


def backward(table: str, width: int, entry: tuple[int, ...], *times: float) -> Measured[tune_backward.Candidate]:
    candidate = tune_backward.Candidate(table, width, entry)
    return Measured(candidate, dict(zip(tune_backward.ROWS, times, strict=True)))


#: For 1024 the second is the best in the mean, though the first is faster once. For 32768 parts are the best.
BACKWARD = [
    backward("rms", 1024, (4, 4, 6, 1), 9.0, 40.0),
    backward("rms", 1024, (4, 2, 4, 2), 10.0, 20.0),
    backward("rms", 1024, (8, 8, 2, 1), 30.0, 30.0),
    backward("rms", 32768, (16, 1, 1, 1), 90.0, 90.0),
    backward("rms", 32768, (), 80.0, 80.0),
    backward("layer", 4096, (8, 1, 3, 2), 5.0, 5.0),
]
FORWARD = [
    Measured(tune.Candidate("rms", 1024, 4, 4, 0, 0, 16), {1: 2.0, 4096: 9.0}),
    Measured(tune.Candidate("rms", 1024, 4, 1, 1, 3, 8), {1: 2.1, 4096: 5.0}),
]


def test_the_backward_configuration_is_the_best_in_the_mean() -> None:
    assert tune_backward.table(BACKWARD) == {"rms": [[2048, 4, 2, 4, 2]], "layer": [[8192, 8, 1, 3, 2]]}


@pytest.mark.parametrize("words", [["tune"], ["tune", "--backward"]], ids=" ".join)
def test_what_is_written_is_a_table(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(launch, "gpu_of", lambda device: GPU)
    monkeypatch.setattr(tune, "tune", lambda: FORWARD)
    monkeypatch.setattr(tune_backward, "tune", lambda: BACKWARD)
    cli.main(words)
    (file,) = tmp_path.iterdir()
    made: Tables = json.loads(file.read_text())
    assert file.name in capsys.readouterr().out
    if "--backward" in words:
        assert file.name == "backward_configs.json"
        monkeypatch.setattr(backward_configs, "tables", lambda: made | backward_configs.load(file.name))
        found = backward_configs.config("rms", 1024, 2, GPU)
        assert (found.warps, found.rows, found.programs, found.stages) == (4, 2, 4, 2)
        assert backward_configs.config("rms", 32768, 2, GPU).parts > 1
    else:
        assert file.name == "configs.json"
        monkeypatch.setattr(configs, "tables", lambda: made | configs.load(file.name))
        found = configs.config("rms", 1024, 2, GPU)
        assert (found.warps, found.rows, found.late, found.lean) == (4, 1, True, 3)
