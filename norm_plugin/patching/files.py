"""Writing a file so that a kill at any moment leaves it old or new, and never in between."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def temporary(path: Path) -> Path:
    """Where the new text is written first; known, so that what a killed run left there can be removed."""
    return path.with_name(f".{path.name}.norm_plugin")


def write(path: Path, text: bytes) -> None:
    """Put `text` in the place of a file, with its mode. Hard links, as uv makes to its cache, keep the old text."""
    new = temporary(path)
    with open(new, "wb") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    if path.exists():
        shutil.copymode(path, new)
    os.replace(new, path)
    _sync(path.parent)


def write_source(path: Path, text: bytes) -> None:
    """`write` for a Python file, whose compiled forms go: one that is marked unchecked would be run for ever."""
    for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
        compiled.unlink(missing_ok=True)
    write(path, text)


def _sync(folder: Path) -> None:
    """Make a rename last through a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
