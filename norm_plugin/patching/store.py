"""What is applied, what a killed run was about to do, and the bytes to go back to.

All of it lies in .norm_plugin_patches/ENGINE beside the engine's package: `record.json` says what is applied, `kept/`
has every original and every patched file by its hash. A change writes `pending.json`, then the files, then the record,
and then takes `pending.json` away, so whoever comes after a kill knows which of the two states to restore.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from norm_plugin.patching import files, lock
from norm_plugin.patching.catalog import sha256
from norm_plugin.patching.errors import PatchError

STATE = ".norm_plugin_patches"


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


class Store:
    """The state of one engine in one folder."""

    def __init__(self, site: Path, engine: str) -> None:
        self.site = site
        self.folder = site / STATE / engine
        self.lock = site / STATE / f"{engine}.lock"

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Hold the engine's files, with whatever a killed run left behind put right, and undo what fails half-way."""
        try:
            with lock.held(self.lock):
                self._recover()
                try:
                    yield
                except BaseException:
                    self._recover()
                    raise
                finally:
                    if not self.interrupted():
                        self._tidy()
        except OSError as refused:
            state = "an unfinished change, which the next run takes back" if self.interrupted() else "what was there"
            raise PatchError(f"{refused.filename or self.site}: {refused.strerror}; the files are {state}") from refused

    def record(self) -> Record:
        """What is applied."""
        return self._read("record.json") or Record()

    def interrupted(self) -> bool:
        """Whether a run was killed; the next one that changes anything goes back to what was before it."""
        return (self.folder / "pending.json").exists()

    def current(self, path: str) -> bytes | None:
        """A file as it is now."""
        place = self.site / path
        return place.read_bytes() if place.is_file() else None

    def original(self, path: str, record: Record) -> bytes | None:
        """A file without the patches of a record: as kept, or as it is if none has touched it."""
        change = record.files.get(path)
        return self.current(path) if change is None else self._kept(change.before)

    def change(self, target: Record, texts: dict[str, bytes]) -> None:
        """Make `target` true. `texts` has every original and every wanted file by its hash."""
        now = self.record()
        (self.folder / "kept").mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            if not self._has(name):
                files.write(self.folder / "kept" / name, text)
        files.write(self.folder / "pending.json", json.dumps(asdict(target), indent=1).encode())
        paths = [*now.files, *(path for path in target.files if path not in now.files)]
        if len(target.files) < len(now.files):
            paths.reverse()  # what a file needs from another one goes after it, as it came before it
        for path in paths:
            self._restore(path, target.wanted(path, now))
        files.write(self.folder / "record.json", json.dumps(asdict(target), indent=1).encode())
        (self.folder / "pending.json").unlink()

    def forget(self) -> None:
        """Drop the record of an engine that has been installed anew."""
        (self.folder / "record.json").unlink(missing_ok=True)

    def _recover(self) -> None:
        target = self._read("pending.json")
        if target is None:
            return
        now = self.record()
        for path in {**now.files, **target.files}:
            files.temporary(self.site / path).unlink(missing_ok=True)
            was, would = now.wanted(path, target), target.wanted(path, now)
            text = self.current(path)
            if text is None or sha256(text) not in (was, would):
                raise PatchError(
                    f"a run that was killed had begun to change {path}, and somebody else has changed it since. "
                    f"{self.folder / 'kept'} has it as it was ({was}): put it back, or install the engine again"
                )
            self._restore(path, was)
        (self.folder / "pending.json").unlink()

    def _restore(self, path: str, name: str) -> None:
        text = self.current(path)
        if text is None or sha256(text) != name:
            files.write_source(self.site / path, self._kept(name))

    def _tidy(self) -> None:
        """Nothing is left behind where nothing is applied."""
        if not self.record().patches:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.lock.unlink(missing_ok=True)
            with suppress(OSError):  # another engine's state, or another run's lock, is in it
                self.lock.parent.rmdir()

    def _read(self, name: str) -> Record | None:
        place = self.folder / name
        if not place.exists():
            return None
        found = json.loads(place.read_text())
        changes = {path: Change(**change) for path, change in found["files"].items()}
        return Record(found["version"], tuple(found["patches"]), changes)

    def _has(self, name: str) -> bool:
        place = self.folder / "kept" / name
        return place.is_file() and sha256(place.read_bytes()) == name

    def _kept(self, name: str) -> bytes:
        if not self._has(name):
            raise PatchError(f"{self.folder / 'kept' / name} is gone or damaged: install the engine again to go back")
        return (self.folder / "kept" / name).read_bytes()
