"""The sequences can fail: they find each of two planted defects, in a process whose memory the defect may spoil.

The process is not forked, because a forked one waits for ever for OpenMP threads that only its parent has.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.device import COMPILED, INTERPRETED
from tests.sequences.planted import ABOUT

STEPS = 3000  # the run ends at the first failure, which most seeds find within 300
SECONDS = 300
SEED = os.environ.get("SEQUENCE_SEED", "14")

#: How each defect shows.
SHOWS = {"output strides": r"guard: \d+ elements|beyond its bound", "fallback": "beyond its bound"}


@pytest.mark.skipif(not (COMPILED or INTERPRETED), reason="the native path launches nothing")
@pytest.mark.parametrize("name", ABOUT)
def test_a_planted_defect_is_found(name: str, tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    command = [sys.executable, "-m", "tests.sequences.child", "--planted", name, "--json", str(result)]
    command += ["--steps", str(STEPS), "--seed", SEED, "--seconds", str(SECONDS)]
    child = subprocess.run(command, capture_output=True, text=True, timeout=2 * SECONDS)
    if not result.exists():  # the defect killed the process
        assert child.returncode < 0, child.stderr
        return
    found = json.loads(result.read_text())["failure"]
    assert re.search(SHOWS[name], found), found or f"{STEPS} steps noticed nothing"
