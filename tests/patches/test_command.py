"""norm-plugin patch, as it is typed; once from a wheel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from norm_plugin import cli
from norm_plugin.commands.errors import NOT_RUN, WRONG_ARGUMENT
from tests.patches.conftest import Site, contents

ROOT = Path(__file__).parents[2]


def typed(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = 0
    try:
        cli.main(["patch", *arguments])
    except SystemExit as end:
        status = int(end.code or 0)
    said = capsys.readouterr()
    return status, " ".join(said.out.split()), said.err


def test_from_list_to_revert(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    folder = site("sglang", "sglang==0.5.23")
    before = contents(folder)
    where = ("--engine", "sglang", "--site", str(folder))
    status, out, _ = typed(capsys, "list", *where)
    assert status == 0
    assert all(name in out for name in ("deterministic-add", "native-direct", "native-switch", "ready"))
    status, out, _ = typed(capsys, "check", *where)
    assert status == 0
    assert "would be applied: deterministic-add, native-switch (sglang 0.5.23" in out
    assert "sglang/srt/layers/layernorm.py" in out
    assert contents(folder) == before
    assert typed(capsys, "apply", *where)[1].startswith("applied: deterministic-add, native-switch (sglang 0.5.23")
    assert contents(folder) != before
    assert "already in: native-switch" in typed(capsys, "apply", "native-switch", *where)[1]
    status, _, err = typed(capsys, "apply", "native-direct", *where)
    assert status == NOT_RUN
    assert err.startswith("norm-plugin patch: native-direct and native-switch change the same lines of sglang/")
    assert err.count("\n") == 1
    assert "reverted: native-switch (" in typed(capsys, "revert", "native-switch", *where)[1]
    assert "reverted: deterministic-add (" in typed(capsys, "revert", *where)[1]
    assert contents(folder) == before


def test_json(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    folder = site("sglang", "sglang==0.5.17")
    where = ("--engine", "sglang", "--site", str(folder), "--json")
    listed = json.loads(typed(capsys, "list", *where)[1])
    assert {patch["name"]: patch["state"] for patch in listed["patches"]}["native-switch"] == "ready"
    assert json.loads(typed(capsys, "apply", "native-switch", *where)[1])["applied"] == ["native-switch"]
    status, out, err = typed(capsys, "apply", "nothing", *where)
    assert status == NOT_RUN
    assert json.loads(out)["refused"] in err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["apply"], "--engine"),
        (["list", "--engine", "trt"], "invalid choice: 'trt'"),
        (["patch"], "invalid choice"),
        (
            ["list", "--engine", "vllm", "--site", ""],
            "argument --site: it is empty; give a folder, or leave",
        ),
    ],
)
def test_a_wrong_argument_is_one_line(arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = typed(capsys, *arguments)
    assert status == WRONG_ARGUMENT
    assert reason in err
    assert err.count("\n") == 1


def test_a_wheel_carries_the_patches(site: Site, tmp_path: Path) -> None:
    """Built from a copy of the sources, installed elsewhere, and run from there."""
    known = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(known, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    source = tmp_path / "source"
    for name in listed.splitlines():
        place = source / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            place.symlink_to((ROOT / name).readlink())
        elif (ROOT / name).is_file():
            place.write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--quiet", "install", "--no-deps", "--target", str(tmp_path / "there")]
    subprocess.run([*pip, str(source)], check=True)
    folder = site("vllm", "vllm==0.32.0")
    before = contents(folder)
    program = "import norm_plugin.cli as c, sys; print(c.__file__, file=sys.stderr); c.main()"
    for action in ("apply", "revert"):
        ran = subprocess.run(
            [sys.executable, "-c", program, "patch", action, "--engine", "vllm", "--site", str(folder), "--json"],
            env={**os.environ, "PYTHONPATH": str(tmp_path / "there")}, cwd=tmp_path,
            capture_output=True, text=True,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr
        assert ran.stderr.startswith(str(tmp_path / "there"))
        assert json.loads(ran.stdout)["applied" if action == "apply" else "reverted"] == [
            "mixer2-groups", "native-switch", "strided-gate",
        ]  # fmt: skip
        assert (contents(folder) == before) == (action == "revert")
