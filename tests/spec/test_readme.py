"""The README agrees with the code and with the results."""

import re
import runpy
from pathlib import Path

import norm_plugin

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_tables_are_those_of_the_code():
    rewritten = runpy.run_path(str(ROOT / "scripts" / "readme.py"))["rewritten"]
    assert rewritten(README) == README, "run: python scripts/readme.py"


def test_the_first_paragraph_has_the_figures_of_the_table():
    gain = runpy.run_path(str(ROOT / "scripts" / "readme.py"))["gain"]()
    figures = re.findall(r"\d\.\d\d", README.split("\n\n")[1])
    assert len(figures) == 6
    assert all(re.search(rf"\b{re.escape(figure)}\b", gain) for figure in figures)


def test_every_public_function_has_a_row():
    assert set(re.findall(r"^\| `(\w+)\(", README, re.MULTILINE)) == set(norm_plugin.__all__)
