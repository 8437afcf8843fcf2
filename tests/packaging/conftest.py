"""The release, built once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.packaging.fresh import Fresh, sources


@pytest.fixture(scope="session")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the sdist, and the wheel that is built from it."""
    place = tmp_path_factory.mktemp("release")
    copy = sources(place / "checkout")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(place / "dist"), str(copy)]
    done = subprocess.run(build, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return place / "dist"


@pytest.fixture(scope="session")
def wheel(dist: Path) -> Path:
    """The one wheel."""
    (found,) = dist.glob("*.whl")
    return found


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Fresh:
    """A new environment with the wheel in it, beside a torch that was there before."""
    fresh = Fresh(tmp_path_factory.mktemp("installed") / "venv")
    done = fresh.pip("install", "--no-index", f"{wheel}[cli]")
    assert done.returncode == 0, done.stderr
    return fresh
