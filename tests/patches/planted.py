"""What a stranger has put into a tree, and what the command says to it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from norm_plugin import cli
from norm_plugin.commands.errors import NOT_RUN
from norm_plugin.patching.catalog import sha256
from norm_plugin.patching.tree import STATE
from tests.patches.conftest import VICTIM, contents

MIXER = "vllm/model_executor/layers/mamba/mamba_mixer2.py"
GUARD = "vllm/third_party/flash_linear_attention/ops/layernorm_guard.py"
PAYLOAD = b"planted = True\n"

Plant = Callable[[Path, str], None]


def typed(capsys: pytest.CaptureFixture[str], action: str, folder: Path, *names: str) -> tuple[int, str, str]:
    status = 0
    try:
        cli.main(["patch", action, *names, "--engine", "vllm", "--site", str(folder)])
    except SystemExit as end:
        status = int(end.code or 0)
    said = capsys.readouterr()
    return status, said.out, said.err


def all_refuse(
    capsys: pytest.CaptureFixture[str], folder: Path, *reasons: str, actions: tuple[str, ...] = ("list", "check")
) -> None:
    """Every action says one of the reasons in one line, and changes nothing, in the tree or beside it."""
    before = contents(folder.parent)
    for action in (*actions, "apply", "revert"):
        status, out, err = typed(capsys, action, folder)
        assert (status, out) == (NOT_RUN, ""), action
        assert err.startswith("norm-plugin patch: ")
        assert err.endswith("\n")
        assert err[:-1].isprintable()
        assert any(reason in err for reason in reasons), err
        assert contents(folder.parent) == before, action


def record(*paths: str) -> bytes:
    """One that has the payload as the original of these files, and what the victim has as the patched text."""
    change = {"before": sha256(PAYLOAD), "after": sha256(VICTIM)}
    return json.dumps(
        {"version": "0.33.0", "patches": ["mixer2-groups"], "files": dict.fromkeys(paths, change)}
    ).encode()


def plant(folder: Path, name: str, text: bytes) -> None:
    """A state of somebody's making."""
    state = folder / STATE / "vllm"
    (state / "kept").mkdir(parents=True, exist_ok=True)
    for kept in (PAYLOAD, VICTIM):
        (state / "kept" / sha256(kept)).write_bytes(kept)
    (state / name).write_bytes(text)
    if name == "pending.json":  # a run that was killed while nothing was applied
        (state / "record.json").write_bytes(b'{"version": "0.33.0", "patches": [], "files": {}}')
