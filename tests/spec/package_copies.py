"""A copy of the package and of its tests, which a test changes, and a Python that has it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
WITHOUT = shutil.ignore_patterns("__pycache__", "engines", "patches")


def copy_package(root: Path) -> None:
    """Put a copy into `root`."""
    shutil.copytree(ROOT / "norm_plugin", root / "norm_plugin", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tests", root / "tests", ignore=WITHOUT)
    shutil.copy(ROOT / "pyproject.toml", root)


def python(root: Path, *arguments: str, **environment: str) -> str:
    """What a Python prints that has the copy in `root`."""
    ours = {"PYTHONPATH": str(root), "NORM_PLUGIN": "native", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=root,
        env=os.environ | ours | environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
