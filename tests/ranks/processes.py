"""Several Python processes that are the ranks of one group."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def together(size: int, folder: Path, *arguments: str, timeout: int = 300, **environ: str) -> list[str]:
    """What `python arguments` prints with RANK, SIZE and FOLDER set, for each rank. All must end well."""
    common = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "SIZE": str(size), "FOLDER": str(folder)}
    processes = [
        subprocess.Popen(
            [sys.executable, *arguments],
            env=os.environ | common | {"RANK": str(rank)} | environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        said = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any(process.returncode for process in processes), "\n".join(said)[-6000:]
    return said
