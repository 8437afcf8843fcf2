"""The machine code of the kernel across ranks, compiled by the installed, the oldest and the newest Triton."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

ROOT = Path(__file__).parents[2]
TRITONS = ["the one installed", "3.6.0", "3.9.0"]

#: The bytes that a thread may spill: some registers of what waits for eight ranks at once.
MOST_STACK = 64


@cache
def reports(version: str) -> list[dict[str, Any]]:
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "tests/ranks/compile_only.py"]
    if version == TRITONS[0]:
        version = importlib.metadata.version("triton")
    else:
        folder = ROOT / ".venv" / f"triton-{version}"
        if not folder.exists():
            pytest.skip(f"triton {version} is not in {folder.relative_to(ROOT)}: scripts/test puts it there")
        environment["PYTHONPATH"] = f"{folder}{os.pathsep}{ROOT}"
        command.append("--few")
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["triton"] == version
    said: list[dict[str, Any]] = found["reports"]
    return said


@pytest.mark.parametrize("version", TRITONS)
def test_it_compiles(version: str) -> None:
    """Few registers are spilled, nothing is touched before the wait for the kernel before, and launches are short."""
    found = reports(version)
    assert len(found) >= 11
    assert [r["label"] for r in found if r["stack"] > MOST_STACK] == []
    assert [r["label"] for r in found if r["before_wait"]] == []
    assert [(r["label"], r["no_short_road"]) for r in found if r["no_short_road"]] == []


@pytest.mark.parametrize("version", TRITONS)
def test_squares_are_added_in_one_order(version: str) -> None:
    """One shot and two, on any number of ranks, sum in the same layout, so in the same order."""
    orders: dict[str, set[str]] = {}
    for report in reports(version):
        assert report["layouts"], report["label"]
        orders.setdefault(str(report["order"]), set()).add(str(report["layouts"]))
    assert {order: found for order, found in orders.items() if len(found) > 1} == {}
