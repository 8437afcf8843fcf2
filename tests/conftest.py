"""The backend of a test run; and one folder for all that it leaves in the temporary folder, which goes when it ends.

Engines leave sockets and compilers leave files there, by the hundred. pytest's own tmp_path stays where it was, and so
does Inductor's cache, which the next run uses.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest

FOLDER = pytest.StashKey[str]()


def pytest_addoption(parser: pytest.Parser) -> None:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # which holds for a whole process
    parser.addoption(
        "--backend",
        choices=("native", "triton"),
        default="triton" if interpreted else "native",
        help="what tests/spec runs on; triton: only the tests that take a backend; default: triton where "
        "TRITON_INTERPRET=1 is set",
    )


def pytest_configure(config: pytest.Config) -> None:
    usual = Path(tempfile.gettempdir())
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(usual))
    vectors = os.environ.get("ATEN_CPU_CAPABILITY", "")  # Inductor's key lacks it
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(usual / f"torchinductor_{os.getuid()}{vectors}"))
    made = tempfile.mkdtemp(prefix="norm_plugin.")  # short, because the path of a socket has at most 107 characters
    config.stash[FOLDER] = os.environ["TMPDIR"] = tempfile.tempdir = made


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(config.stash[FOLDER], ignore_errors=True)
