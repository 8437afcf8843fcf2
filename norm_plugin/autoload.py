"""Registers norm_plugin by a .pth where SGLang loads no plugin: in Ray actors, encoder workers and one_batch.

Python runs the one line of a .pth at every start. The line reads two environment variables. If one asks for
norm_plugin, it imports the module beside it, which waits for SGLang. pip does not know these two files.
"""

from __future__ import annotations

import importlib.resources
import site
import sysconfig
from pathlib import Path

MODULE = "norm_plugin_autoload"
LINE = (
    'import os; ((os.environ.get("NORM_PLUGIN") or "off") != "off" '
    'or (os.environ.get("USE_NATIVE_LAYERNORM") or "0") != "0") '
    f'and __import__("importlib.util").util.find_spec("{MODULE}") and __import__("{MODULE}")\n'
)


class AutoloadError(Exception):
    """Autoload cannot be switched on or off. The message says why, and what to do."""


def folder() -> Path:
    """Where this Python looks for .pth files."""
    return Path(sysconfig.get_path("purelib"))


def files(at: Path) -> tuple[Path, Path]:
    """The .pth and its module."""
    return at / f"{MODULE}.pth", at / f"{MODULE}.py"


def is_on(at: Path) -> bool:
    """Whether both files are there."""
    return all(path.exists() for path in files(at))


def switch_on(at: Path) -> None:
    """Writes both files: the .pth last, so that it never lacks its module."""
    if str(at) not in [*site.getsitepackages(), site.getusersitepackages(), str(folder())]:
        raise AutoloadError(f"{at} is not a folder in which this Python looks for .pth files; {folder()} is")
    line, module = files(at)
    source = importlib.resources.files("norm_plugin.engines").joinpath("autoloaded.py").read_text()
    try:
        module.write_text(source)
        line.write_text(LINE)
    except OSError as error:
        raise AutoloadError(f"{at} cannot be written ({error.strerror}): run this as its owner") from error


def switch_off(at: Path) -> None:
    """Removes both files, and what Python compiled: the .pth first."""
    compiled = (at / "__pycache__").glob(f"{MODULE}.*.pyc")
    try:
        for path in (*files(at), *compiled):
            path.unlink(missing_ok=True)
    except OSError as error:
        raise AutoloadError(f"{at} cannot be written ({error.strerror}): run this as its owner") from error
