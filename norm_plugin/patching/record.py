"""What is applied, as it is kept in a file. It is read with care: whoever made the tree may have written it."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath
from typing import Any

#: The largest record that is read. One with every patch of a release has less than 2 KiB.
MOST_BYTES = 1 << 18

_HASH = re.compile(r"[0-9a-f]{64}")

#: What the name of a patch looks like, and a version.
NAME = re.compile(r"[0-9A-Za-z][0-9A-Za-z.+!_-]{0,99}")


class NotARecord(ValueError):
    """What is wrong with a text that should be a record."""


@dataclass(frozen=True)
class Change:
    """The hashes of one file before any patch and with those that are applied."""

    before: str
    after: str


@dataclass(frozen=True)
class Record:
    """A state of the engine's files: which patches are in, and what that makes of each file."""

    version: str = ""
    patches: tuple[str, ...] = ()
    files: dict[str, Change] = field(default_factory=dict)

    def wanted(self, path: str, other: Record) -> str:
        """The hash of a file in this state; a file that only the other state names is as it was there before."""
        change = self.files.get(path)
        return change.after if change is not None else other.files[path].before

    def text(self) -> bytes:
        """As it is kept."""
        return json.dumps(asdict(self), indent=1).encode()


def parse(text: bytes, engine: str) -> Record:
    """The record of an engine's files; raises NotARecord with what is wrong."""
    if len(text) > MOST_BYTES:
        raise NotARecord(f"it has more than {MOST_BYTES} bytes")
    try:
        found = json.loads(text.decode(), object_pairs_hook=_once)
    except NotARecord:
        raise
    except (ValueError, RecursionError) as error:
        raise NotARecord(f"it is not JSON: {error}" if text.strip() else "it is empty") from None
    version, patches, files = _fields(found, "it", "version", "patches", "files")
    if not isinstance(patches, list) or not isinstance(files, dict):
        raise NotARecord("its patches are not a list, or its files not an object")
    if bool(patches) != bool(files):
        raise NotARecord("it has patches without files, or files without patches")
    _match(version, NAME, "a version")
    for name in patches:
        _match(name, NAME, "the name of a patch")
    if len(set(patches)) < len(patches):
        raise NotARecord("it names a patch twice")
    changes = {}
    for path, change in files.items():
        parts = PurePosixPath(path).parts  # below the engine's package, in its one spelling
        if "/".join(parts) != path or ".." in parts or len(parts) < 2 or parts[0] != engine or not path.isprintable():
            raise NotARecord(f"{path!r:.200} is not a file of the package {engine}")
        changes[path] = Change(*_fields(change, f"what it says of {path!r:.200}", "before", "after"))
        for sha in (changes[path].before, changes[path].after):
            _match(sha, _HASH, "a sha256")
    return Record(version, tuple(patches), changes)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise NotARecord("it has a name twice in one object")
    return found


def _fields(found: Any, what: str, *names: str) -> list[Any]:
    if not isinstance(found, dict) or set(found) != set(names):
        raise NotARecord(f"{what} is not an object of {', '.join(names)}")
    return [found[name] for name in names]


def _match(text: Any, form: re.Pattern[str], what: str) -> None:
    if not isinstance(text, str) or form.fullmatch(text) is None:
        raise NotARecord(f"{text!r:.100} is not {what}")
