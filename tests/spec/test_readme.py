"""What the README says of the code is what the code says."""

import re
import runpy
from pathlib import Path

import norm_plugin

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_tables_are_those_of_the_code():
    rewritten = runpy.run_path(str(ROOT / "scripts" / "readme.py"))["rewritten"]
    assert rewritten(README) == README, "run: python scripts/readme.py"


def test_every_public_function_has_a_row():
    assert set(re.findall(r"^\| `(\w+)\(", README, re.MULTILINE)) == set(norm_plugin.__all__)
