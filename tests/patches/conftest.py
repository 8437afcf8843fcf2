"""An engine's folder, made of the files that its release really has."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from norm_plugin.patching import catalog
from tests.patches.released import fetch

Site = Callable[..., Path]

INDEX: list[dict[str, Any]] = json.loads((catalog.folder() / "index.json").read_text())
#: What is the user's own, and no tree's.
VICTIM = b"the user's own\n"

#: (engine, what pip calls a version, the files) of every version that the index names.
VERSIONS = [
    (entry["engine"], f"{entry['requirement'].split('==')[0]}=={version}", tuple(entry["files"]))
    for entry in INDEX
    for version in entry["versions"]
]


@pytest.fixture(scope="session")
def _fetched() -> None:
    """All of them at once: one after another takes minutes of waiting."""
    with ThreadPoolExecutor(len(VERSIONS)) as pool:
        list(pool.map(lambda one: released(one[1], one[2]), VERSIONS))


@cache
def released(requirement: str, paths: tuple[str, ...]) -> dict[str, bytes]:
    return fetch(requirement, paths)


@pytest.fixture
def site(tmp_path: Path, _fetched: None) -> Site:
    """site("vllm", "vllm==0.33.0"): a folder with the released files that patches are for, and the wheel's metadata."""

    def make(engine: str, requirement: str, under: str = "site") -> Path:
        paths = next(paths for of, name, paths in VERSIONS if (of, name) == (engine, requirement))
        for path, text in released(requirement, paths).items():
            if path.endswith("RECORD"):  # a megabyte that nobody reads
                continue
            place = tmp_path / under / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(text)
        return tmp_path / under

    return make


@pytest.fixture
def tree(site: Site) -> Path:
    """vLLM's in a folder that has something of the user's beside it."""
    folder = site("vllm", "vllm==0.33.0")
    (folder.parent / "victim.py").write_bytes(VICTIM)
    return folder


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder of the user's that no tree should reach."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "own").write_bytes(VICTIM)
    return tmp_path / "outside"


def contents(folder: Path) -> dict[str, bytes]:
    """Every file in a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
