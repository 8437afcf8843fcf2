"""The .pth that registers norm_plugin where SGLang loads no plugin: in Ray actors, encoder workers and one_batch.

Python runs the one line of a .pth at every start. The line asks for two environment variables, and only where one asks
for norm_plugin does it import the module beside it, which waits for SGLang. pip knows nothing of the two files.
"""

from __future__ import annotations

import importlib.resources
import site
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MODULE = "norm_plugin_autoload"
LINE = (
    'import os; ((os.environ.get("NORM_PLUGIN") or "off") != "off" '
    'or (os.environ.get("USE_NATIVE_LAYERNORM") or "0") != "0") '
    f'and __import__("importlib.util").util.find_spec("{MODULE}") and __import__("{MODULE}")\n'
)


class AutoloadError(Exception):
    """The .pth cannot be written or removed; the message says why and what to do."""


def folder() -> Path:
    """Where this Python looks for .pth files."""
    return Path(sysconfig.get_path("purelib"))


def files(at: Path) -> tuple[Path, Path]:
    """The .pth and its module."""
    return at / f"{MODULE}.pth", at / f"{MODULE}.py"


def is_on(at: Path) -> bool:
    return all(path.exists() for path in files(at))


def switch_on(at: Path) -> None:
    """Write both: the .pth last, so that it never lacks its module."""
    if str(at) not in [*site.getsitepackages(), site.getusersitepackages(), str(folder())]:
        raise AutoloadError(f"{at} is not a folder in which this Python looks for .pth files; {folder()} is")
    line, module = files(at)
    source = importlib.resources.files("norm_plugin.engines").joinpath("autoloaded.py").read_text()
    with _writing(at):
        module.write_text(source)
        line.write_text(LINE)


def switch_off(at: Path) -> None:
    """Remove both, and what Python compiled: the .pth first."""
    compiled = (at / "__pycache__").glob(f"{MODULE}.*.pyc")
    with _writing(at):
        for path in (*files(at), *compiled):
            path.unlink(missing_ok=True)


@contextmanager
def _writing(at: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise AutoloadError(f"{at} cannot be written ({error.strerror}): run this as its owner") from error
