"""The folder that an engine's package lies in. Nothing outside it is read or written, whatever links are in it.

A path is opened name by name from a handle on the folder, and no step follows a link, not even one that is put there
meanwhile. Only `real` follows links: it gives the path behind them if that is in the same folder.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import stat
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from norm_plugin.patching import PatchError
from norm_plugin.patching.catalog import sha256

#: Where the state of the patches lies in a tree.
STATE = ".norm_plugin_patches"

#: More than any source file has. A sparse file can say that it has far more.
MOST_BYTES = 1 << 24

#: How many seconds another run is waited for.
PATIENCE = 60.0

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # a pipe without a writer would be waited for
_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{16}\.norm_plugin")

#: What the system says of a link, or of anything but a folder, where a folder must be.
_NO_FOLDER = (errno.ELOOP, errno.ENOTDIR)


class Changed(PatchError):
    """Somebody else changed a file between the look at it and the writing."""

    def __init__(self, message: str, path: str) -> None:
        super().__init__(message)
        self.path = path


class Tree:
    """A folder, known by its real path. All paths are relative to it, with / between their names."""

    def __init__(self, root: Path) -> None:
        self.root = Path(os.path.realpath(root))
        self._handle = os.open(self.root, _FOLDER)  # one for all: what has this name later may be another folder
        weakref.finalize(self, os.close, self._handle)

    def real(self, path: str) -> str:
        """The path in the tree that this one leads to; raises if that is somewhere else."""
        place = os.path.realpath(self.root / path)
        inside = os.path.relpath(place, self.root)
        if inside.split(os.sep)[0] in (os.pardir, os.curdir, STATE):
            raise PatchError(
                f"{self.root / path} leads through a link to {place}, which is not a file of {self.root}: name the "
                f"folder that the package really lies in with --site, or put a copy of the file in the link's place"
            )
        return inside

    def read(self, path: str, most: int = MOST_BYTES) -> bytes | None:
        """A file's bytes, None where there is none; no more of them than one over `most`."""
        try:
            with self.at(path) as (folder, name):
                handle = os.open(name, os.O_RDONLY | _FILE, dir_fd=folder)
        except FileNotFoundError:
            return None
        try:
            self._regular(path, os.fstat(handle).st_mode)  # before `open`, which would raise for a folder
            with open(handle, "rb", closefd=False) as file:
                return file.read(most + 1)
        finally:
            os.close(handle)

    def write(self, path: str, text: bytes, instead_of: str | None = None) -> None:
        """Put a new file in the place of one, so that a kill at any moment leaves the old or the new.

        `instead_of` is the hash of what is replaced: where something else is there by now, it stays, and `Changed` is
        raised. Hard links, as uv makes them to its cache, keep the old text.
        """
        with self.at(path, make=instead_of is None) as (folder, name):
            was = _status(name, folder)
            if was is not None:
                self._regular(path, was.st_mode)
            new = f".{name}.{secrets.token_hex(8)}.norm_plugin"
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _FILE
            handle = os.open(new, flags, 0o666 if was is None else 0o600, dir_fd=folder)
            try:
                with open(handle, "wb") as file:
                    file.write(text)
                    file.flush()
                    if was is not None:
                        _like(handle, was)
                    os.fsync(handle)
                now = self.read(path) if instead_of is not None else None
                if instead_of is not None and (now is None or sha256(now) != instead_of):
                    raise Changed(
                        f"{self.root / path} was changed by somebody else meanwhile, and stays as it is", path
                    )
                os.replace(new, name, src_dir_fd=folder, dst_dir_fd=folder)
            except BaseException:
                with suppress(FileNotFoundError):
                    os.unlink(new, dir_fd=folder)
                raise
            os.fsync(folder)  # so that the new name lasts through a power cut

    def write_source(self, path: str, text: bytes, instead_of: str) -> None:
        """`write` for a Python file, whose compiled forms go: one that is marked unchecked would be run for ever."""
        stem = Path(path).stem
        compiled = f"{os.path.dirname(path) or os.curdir}/__pycache__/"
        for name in self.names(compiled):
            if name.startswith(f"{stem}.") and name.endswith(".pyc"):
                self.remove(compiled + name)
        self.write(path, text, instead_of)

    def remove(self, path: str) -> None:
        """Remove a file or a link, if it is there. The target of a link stays."""
        with suppress(FileNotFoundError), self.at(path) as (folder, name):
            os.unlink(name, dir_fd=folder)

    def remove_files(self, path: str) -> None:
        """Remove a folder and the files in it, if it is there. Anything but a file stays, and then the folder too."""
        for name in self.names(f"{path}/"):
            with suppress(OSError):
                self.remove(f"{path}/{name}")
        self.remove_empty(path)

    def remove_empty(self, path: str) -> None:
        """Remove a folder, if it is there and empty."""
        with suppress(OSError, PatchError), self.at(path) as (folder, name):
            os.rmdir(name, dir_fd=folder)

    def names(self, path: str) -> list[str]:
        """The names in a folder, whose path ends with a /; none if it does not exist."""
        try:
            with self.at(path) as (folder, _):
                return sorted(os.listdir(folder))
        except FileNotFoundError:
            return []

    def sweep(self, path: str) -> None:
        """Remove what killed runs left beside a file; with a / at the end of the path, all that they left there."""
        folder, of = os.path.split(path)
        folder = folder or os.curdir
        for name in self.names(f"{folder}/"):
            left = _TEMPORARY.fullmatch(name)
            if left is not None and of in ("", left.group(1)):
                self.remove(f"{folder}/{name}")

    def identity(self, path: str) -> tuple[int, int] | None:
        """What tells a file, or a link even to nowhere, from all others by any name; None if there is none."""
        with suppress(FileNotFoundError), self.at(path) as (folder, name):
            found = _status(name, folder)
            return None if found is None else (found.st_dev, found.st_ino)
        return None

    @contextmanager
    def at(self, path: str, make: bool = False) -> Iterator[tuple[int, str]]:
        """A handle on the folder that a path is in, and the last name; with `make` a folder that is not there is made.

        What the system refuses, here and in the block, names the whole path.
        """
        *names, last = path.split("/")
        handle = os.open(os.curdir, _FOLDER, dir_fd=self._handle)
        try:
            for name in names:
                if make:
                    with suppress(FileExistsError):
                        os.mkdir(name, dir_fd=handle)
                below = os.open(name, _FOLDER, dir_fd=handle)
                os.close(handle)
                handle = below
            yield handle, last
        except OSError as error:
            place = self.root / path
            if error.errno in _NO_FOLDER:
                raise PatchError(
                    f"{place} is a link, or leads through one or through a file: put the real one in its place"
                ) from error
            raise OSError(error.errno, error.strerror, str(place)) from error
        finally:
            os.close(handle)

    @contextmanager
    def held(self, path: str, patience: float = PATIENCE) -> Iterator[None]:
        """Hold a lock for a block of code: another run that has it is waited for; one that was killed has it no more.

        Its file goes with the lock, and so does the folder if nothing else is in it.
        """
        give_up = time.monotonic() + patience
        while (handle := self._lock(path)) is None:
            if time.monotonic() > give_up:
                raise PatchError(
                    f"another run of norm-plugin patch has held {self.root / path} for {patience:.0f} s: "
                    f"wait for its end"
                )
            time.sleep(0.05)
        try:
            yield
        finally:
            with suppress(OSError, PatchError):  # what was done stays done
                self.remove(path)
            os.close(handle)
            self.remove_empty(os.path.dirname(path))

    def _lock(self, path: str) -> int | None:
        """A handle on the file if nobody else has its lock."""
        with suppress(FileNotFoundError), self.at(path, make=True) as (folder, name):  # it may go with another run
            handle = os.open(name, os.O_RDWR | os.O_CREAT | _FILE, 0o644, dir_fd=folder)
            with suppress(BlockingIOError, FileNotFoundError):
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(handle), os.stat(name, dir_fd=folder, follow_symlinks=False)):
                    return handle  # and not the lock of a run that has just cleaned up behind itself
            os.close(handle)
        return None

    def _regular(self, path: str, mode: int) -> None:
        if not stat.S_ISREG(mode):
            raise PatchError(f"{self.root / path} is not a file: move it away, or install the engine again")


def _status(name: str, folder: int) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return None


def _like(handle: int, was: os.stat_result) -> None:
    """The owner and the mode of the file before, without a bit that would make its owner's rights another's."""
    with suppress(PermissionError):  # only root may give a file away
        os.fchown(handle, was.st_uid, was.st_gid)
    os.fchmod(handle, was.st_mode & 0o777)
