"""The command line where only torch is installed: a child process in which nothing else can be imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from norm_plugin.commands import plain
from norm_plugin.commands.errors import NOT_RUN

#: As in an environment that has torch, and nothing else that the package knows of.
BLOCKED = """
import importlib.machinery, sys

there = importlib.machinery.PathFinder.find_spec
absent = ("rich", "matplotlib", "numpy", "triton", "transformers", "safetensors", "vllm", "sglang")

def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in absent else there(name, path, target)

importlib.machinery.PathFinder.find_spec = find_spec
import contextlib, io, json
from norm_plugin.accuracy import __main__ as accuracy, table
from norm_plugin.cli import main

def run(command):
    if command[0] != "accuracy":
        return main(command)
    table.DTYPES = {"bf16": table.DTYPES["bf16"]}  # a third of the rows, in a third of the time
    return accuracy.main(command[1:])

for command in json.loads(sys.argv[1]):
    code, out, err = 0, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = run(command)
        except SystemExit as end:
            code = end.code
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""

ESCAPE = "\x1b"


def typed(*commands: list[str]) -> list[tuple[int, str, str]]:
    """The exit code, the output and the errors of each verb, or of `accuracy`, the module that is a program of its own.
    One process for all, as it takes seconds to import torch."""
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, json.dumps(commands)],
        stdout=subprocess.PIPE, text=True, check=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ESCAPE not in done.stdout
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def test_every_verb_that_a_machine_with_torch_alone_can_run(tmp_path: Path) -> None:
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").touch()
    (tmp_path / "vllm" / "_version.py").write_text("__version__ = '0.33.0'\n")
    where = ["--engine", "vllm", "--site", str(tmp_path)]
    doctor, listed, listed_json, checked, reverted, autoload, verify, report, helped, accuracy = typed(
        ["doctor", "--json", str(tmp_path / "health.json")],
        ["patch", "list", *where],
        ["patch", "list", "--json", *where],
        ["patch", "check", *where],
        ["patch", "revert", *where],
        ["autoload", "status", "--json"],
        ["verify", "--engine", "vllm"],
        ["report", "/nowhere"],
        ["--help"],
        ["accuracy", "--json", str(tmp_path / "accuracy.json")],
    )
    is_doctors(doctor, json.loads((tmp_path / "health.json").read_text()))
    is_accuracys(accuracy, json.loads((tmp_path / "accuracy.json").read_text()))

    title, headings, *rows = listed[1].splitlines()
    assert (listed[0], title) == (0, f"vllm 0.33.0 in {tmp_path}")
    assert headings.split() == ["patch", "state", "what", "it", "does"]
    assert [row.split()[:2] for row in rows[::2]] == [
        [name, "refused"] for name in ("mixer2-groups", "native-direct", "native-switch", "strided-gate")
    ]
    assert all("does not exist, which vllm 0.33.0 should have" in row for row in rows[1::2])
    assert [patch["state"] for patch in json.loads(listed_json[1])["patches"]] == ["refused"] * 4
    assert (checked[0], checked[1], checked[2].count("\n")) == (NOT_RUN, "", 1)
    assert reverted[:2] == (0, f"reverted: nothing (vllm 0.33.0 in {tmp_path})\n")

    assert isinstance(json.loads(autoload[1])["on"], bool)
    assert verify[0] == NOT_RUN
    assert verify[2].startswith("norm-plugin verify: ")
    assert report[0] == NOT_RUN
    assert report[2].startswith("norm-plugin report: there is no report in /nowhere")
    assert helped[0] == 0
    assert "examples:" in helped[1]


def is_doctors(said: tuple[int, str, str], found: dict[str, Any]) -> None:
    """The JSON that was asked for, and a table with a line for each op."""
    assert said[0] == 0, said
    assert found["well"] is True
    assert {row["backend"] for row in found["probe"]} == {"native"}
    ops = {row["op"] for row in found["probe"]}
    lines = said[1].splitlines()
    heading = next(i for i, line in enumerate(lines) if line.startswith("op ") and line.endswith("its bound"))
    rows = lines[heading + 1 : heading + 1 + len(ops)]
    assert {row.split()[0] for row in rows} == ops
    assert all(row.split()[1] == "native" and row.endswith("pass") for row in rows)


def is_accuracys(said: tuple[int, str, str], found: dict[str, Any]) -> None:
    """A line for each row of its JSON, and the reason why none runs on Triton, as a note."""
    assert (said[0], said[2]) == (0, ""), said
    lines = said[1].splitlines()
    assert lines[0] == "Every op against its fp64 oracle, in ulps of its output"
    assert lines[1].split() == ["op", "numerics", "dtype", "backend", "error", "mean", "bound"]
    assert sum(line.endswith("pass") and "native [1]" in line for line in lines) == len(found["rows"]) > 0
    assert f"[1] {found['rows'][0]['reason']}" in lines
    assert lines[-1].startswith(f"{len(found['rows'])} of {len(found['rows'])} rows within their bounds, on the CPU")


@pytest.mark.parametrize("text", ["[red]x[/]", "[x]", "a\\[b]", "\\", "[/]", "x[0]", "[[bold]]", ""])
def test_what_is_escaped_is_printed_as_it_is(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    plain.Console().print(f"[bold red]{plain.escape(text)}[/] [green]after[/]")
    plain.Console(stderr=True).print(plain.Text(text))
    said = capsys.readouterr()
    assert said.out == f"{text} after\n"
    assert said.err == f"{text}\n"


def test_a_table_of_cells_with_several_lines() -> None:
    table = plain.Table("name", title="[bold]What there is[/]")
    table.add_column("number", justify="right")
    table.add_column("about")
    table.add_row("a", "[red]10[/]", "first\nsecond")
    table.add_row("long name", "9")
    assert str(table) == (
        "What there is\n"
        "name       number  about\n"
        "a              10  first\n"
        "                   second\n"
        "long name       9"
    )  # fmt: skip
