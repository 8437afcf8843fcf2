"""The command line: its one-line errors, and what it says where there is no GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("rich", reason="the command line prints with rich")

from norm_plugin import cli
from norm_plugin.commands import errors


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "VERB"),
        (["measure"], "invalid choice: 'measure'"),
        (["bench", "--part", "huge"], "invalid choice: 'huge'"),
        (["bench", "--ops", "rms,norms"], "no op 'norms'"),
        (["bench", "--seconds", "soon"], "invalid float value: 'soon'"),
        (["tune", "--fast"], "--fast"),
    ],
)
def test_a_wrong_argument_gets_one_line(given: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(given)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said in error
    assert error.startswith("norm-plugin")


@pytest.mark.parametrize("verb", ["bench", "tune"])
def test_without_a_gpu(verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        cli.main([verb])
    assert stopped.value.code == errors.WRONG_ARGUMENT
    assert capsys.readouterr().err == f"norm-plugin {verb}: there is no GPU here that torch can use.\n"
