"""Lists the patches: patches/index.json, and the diff that each entry names."""

from __future__ import annotations

import hashlib
import importlib.resources
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from norm_plugin.patching import PatchError
from norm_plugin.patching.diff import Diff, Hunk, parse


def sha256(text: bytes) -> str:
    """How a file is known."""
    return hashlib.sha256(text).hexdigest()


@dataclass(frozen=True)
class Patch:
    """One patch of one release of an engine: `files` has the hash of each file that it is for."""

    engine: str
    release: str
    name: str
    versions: tuple[str, ...]
    summary: str
    unasked: bool
    files: dict[str, str]

    def is_for(self, engine: str, version: str) -> bool:
        """Whether it is for this version. What stands behind a + in a version only says who built it."""
        return engine == self.engine and version.split("+")[0] in self.versions

    @property
    def place(self) -> Path:
        """The diff."""
        return folder() / self.engine / self.release / f"{self.name}.diff"

    @cached_property
    def diff(self) -> Diff:
        """The diff, parsed; its files are those of the index."""
        found = parse(self.place.read_bytes())
        if set(found.files) != set(self.files):
            raise PatchError(f"{self.place} changes {sorted(found.files)}, and the index says {sorted(self.files)}")
        return found

    def hunks(self, path: str) -> tuple[Hunk, ...]:
        """What it does to one file; nothing to a file that it does not name."""
        return self.diff.files.get(path, ())


def folder() -> Path:
    """The folder of the diffs, inside the installed package."""
    return Path(str(importlib.resources.files("norm_plugin"))) / "patches"


@cache
def patches() -> tuple[Patch, ...]:
    """All of them, in the order of the index."""
    found = []
    for release in json.loads((folder() / "index.json").read_text()):
        for entry in release["patches"]:
            entry["files"] = {path: release["files"][path] for path in entry["files"]}
            found.append(Patch(release["engine"], release["release"], versions=tuple(release["versions"]), **entry))
    return tuple(found)


def of(engine: str, version: str) -> tuple[Patch, ...]:
    """The patches of one version of an engine."""
    found = tuple(patch for patch in patches() if patch.is_for(engine, version))
    if not found:
        known = sorted({v for patch in patches() if patch.engine == engine for v in patch.versions})
        raise PatchError(f"there are no patches for {engine} {version}; there are for {', '.join(known)}")
    return found


def named(known: Iterable[Patch], names: Iterable[str]) -> tuple[Patch, ...]:
    """The patches of these names."""
    by_name = {patch.name: patch for patch in known}
    for name in names:
        if name not in by_name:
            raise PatchError(f"there is no patch {name!r} here; there are {', '.join(by_name)}")
    return tuple(by_name[name] for name in dict.fromkeys(names))


def together(chosen: Iterable[Patch]) -> None:
    """Raise if two of the patches touch the same place of a file."""
    seen: list[Patch] = []
    for patch in chosen:
        for other in seen:
            for path in (path for path in patch.files if path in other.files):
                if any(a.meets(b) for a in patch.hunks(path) for b in other.hunks(path)):
                    raise PatchError(
                        f"{patch.name} and {other.name} change the same lines of {path}: apply one of them, "
                        f"and revert the other first if it is applied"
                    )
        seen.append(patch)
