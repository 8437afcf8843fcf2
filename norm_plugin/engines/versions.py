"""The versions and the GPU that a process runs on, and a hash of norm_plugin itself."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from functools import cache
from pathlib import Path

import torch

import norm_plugin
from norm_plugin.version import __version__


def of_process() -> dict[str, str]:
    """The versions of norm_plugin, Python, torch and Triton; the GPU and its driver, if this process has used it."""
    found = {"norm_plugin": __version__, "python": platform.python_version(), "torch": torch.__version__}
    found["triton"] = version_of("triton")
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found["GPU"] = torch.cuda.get_device_name()
        found["driver"] = _driver()
    else:
        found["GPU"] = "none in this process"
    return found


@cache
def version_of(distribution: str, otherwise: str = "not installed") -> str:
    """The installed version; a source tree on the PYTHONPATH has none."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return otherwise


@cache
def fingerprint() -> str:
    """A hash of our sources and launch configurations: an engine's compile cache would reuse code of others."""
    found = hashlib.sha256()
    root = Path(norm_plugin.__file__).parent
    for folder in (".", "native", "kernels", "engines"):
        for path in sorted((root / folder).glob("*.*")):
            if path.suffix in (".py", ".json"):
                found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()[:16]


@cache
def _driver() -> str:
    try:
        return Path("/sys/module/nvidia/version").read_text().strip()
    except OSError:  # a GPU of another maker, or a container that hides it
        return "unknown"
