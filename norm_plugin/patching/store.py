"""Keeps what is applied, what a killed run was about to do, and the bytes to go back to.

All of it lies in .norm_plugin_patches/ENGINE beside the engine's package: `record.json` says what is applied, `kept/`
has every original and every patched file by its hash. A change writes `pending.json`, then the files, then the record,
and then takes `pending.json` away, so whoever comes after a kill knows which of the two states to restore.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from norm_plugin.patching import PatchError
from norm_plugin.patching.catalog import sha256
from norm_plugin.patching.record import MOST_BYTES, NotARecord, Record, parse
from norm_plugin.patching.tree import STATE, Changed, Tree


class Store:
    """The state of one engine in one folder."""

    def __init__(self, site: Path, engine: str) -> None:
        self.tree = Tree(site)
        self.engine = engine
        self.state = f"{STATE}/{engine}"
        self.lock = f"{STATE}/{engine}.lock"

    @property
    def kept(self) -> Path:
        """Where the texts are, for whoever needs one of them by hand."""
        return self.tree.root / self.state / "kept"

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Hold the engine's files: first repair what a killed run left, and in the end undo what failed half-way."""
        try:
            with self.tree.held(self.lock):
                self.tree.sweep(f"{self.state}/")
                self.tree.sweep(f"{self.state}/kept/")
                self._recover()
                try:
                    yield
                except BaseException as reason:
                    self._recover(stays=reason.path if isinstance(reason, Changed) else None)
                    raise
                finally:
                    if not self.interrupted():
                        self._tidy()
        except OSError as refused:
            state = "an unfinished change, which the next run takes back" if self.interrupted() else "what was there"
            who = ": run it as somebody who may write there" if refused.errno in (errno.EACCES, errno.EPERM) else ""
            raise PatchError(
                f"{refused.filename or self.tree.root}: {refused.strerror}{who}; the files are {state}"
            ) from refused

    def record(self) -> Record:
        """What is applied."""
        return self._read("record.json") or Record()

    def interrupted(self) -> bool:
        """Whether a run was killed; the next one that changes anything goes back to what was before it."""
        return self.tree.identity(f"{self.state}/pending.json") is not None

    def current(self, path: str) -> bytes | None:
        """A file as it is now."""
        return self.tree.read(self.tree.real(path))

    def original(self, path: str, record: Record) -> bytes | None:
        """A file without the patches of a record: as kept, or as it is if none has touched it."""
        change = record.files.get(path)
        return self.current(path) if change is None else self._kept(change.before)

    def change(self, target: Record, texts: dict[str, bytes]) -> None:
        """Make `target` true. `texts` has every original and every wanted file by its hash."""
        now = self.record()
        for name, text in texts.items():
            if not self._has(name):
                self.tree.write(f"{self.state}/kept/{name}", text)
        self.tree.write(f"{self.state}/pending.json", target.text())
        paths = [*now.files, *(path for path in target.files if path not in now.files)]
        if len(target.files) < len(now.files):
            paths.reverse()  # what a file needs from another one goes after it, as it came before it
        for path in paths:
            self._restore(path, now.wanted(path, target), target.wanted(path, now))
        self.tree.write(f"{self.state}/record.json", target.text())
        self.tree.remove(f"{self.state}/pending.json")

    def forget(self) -> None:
        """Drop the record of an engine that has been installed anew."""
        self.tree.remove(f"{self.state}/record.json")

    def _recover(self, stays: str | None = None) -> None:
        """Go back to the record. The file `stays`, which somebody else has just changed, stays as it is."""
        target = self._read("pending.json")
        if target is None:
            return
        now = self.record()
        paths = {**now.files, **target.files}
        self._distinct(paths)
        for path in paths:
            real = self.tree.real(path)
            self.tree.sweep(real)
            if real == stays:
                continue
            was, would = now.wanted(path, target), target.wanted(path, now)
            text = self.current(path)
            if text is None or sha256(text) not in (was, would):
                raise PatchError(
                    f"a run that was killed had begun to change {path}, and somebody else has changed it since. "
                    f"{self.kept} has it as it was ({was}): put it back, or install the engine again"
                )
            self._restore(path, sha256(text), was)
        self.tree.remove(f"{self.state}/pending.json")

    def _restore(self, path: str, now: str, name: str) -> None:
        """Put the text with the hash `name` in the place of a file whose hash must be `now`."""
        if now != name:
            self.tree.write_source(self.tree.real(path), self._kept(name), instead_of=now)

    def _tidy(self) -> None:
        """If nothing is applied, leave nothing behind."""
        if not self.record().patches:
            self.tree.remove_files(f"{self.state}/kept")
            self.tree.remove_files(self.state)

    def _read(self, name: str) -> Record | None:
        path = f"{self.state}/{name}"
        text = self.tree.read(path, MOST_BYTES)
        if text is None:
            return None
        try:
            found = parse(text, self.engine)
        except NotARecord as wrong:
            raise PatchError(
                f"{self.tree.root / path} is no record of norm-plugin patch: {wrong}. Nothing was changed. "
                f"Install the engine again, and remove {self.tree.root / self.state}"
            ) from None
        self._distinct(found.files)
        return found

    def _distinct(self, paths: Iterable[str]) -> None:
        """Raise if two paths are one file, by a link or by the case of their letters."""
        seen: dict[tuple[int, int], str] = {}
        for path in paths:
            identity = self.tree.identity(self.tree.real(path))
            if identity is not None and seen.setdefault(identity, path) != path:
                raise PatchError(
                    f"{self.tree.root / path} and {seen[identity]} are one file, which cannot have two contents: "
                    f"put a copy in the place of one of them"
                )

    def _has(self, name: str) -> bool:
        text = self.tree.read(f"{self.state}/kept/{name}")
        return text is not None and sha256(text) == name

    def _kept(self, name: str) -> bytes:
        text = self.tree.read(f"{self.state}/kept/{name}")
        if text is None or sha256(text) != name:
            raise PatchError(f"{self.kept / name} is gone or damaged: install the engine again to go back")
        return text
