"""Single files of released wheels, fetched from the package index by range requests: a wheel of 300 MB costs 1 MB.

pip says where the wheel is, as it would for an installation on this machine; what is fetched is held against the
hash in the wheel's own RECORD, and stays in a folder of the user's cache.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import subprocess
import sys
import urllib.request
import zipfile
from collections.abc import Iterable
from pathlib import Path

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "norm_plugin" / "wheels"


class Remote(io.RawIOBase):
    """A file behind HTTP, as a seekable one."""

    def __init__(self, url: str) -> None:
        self.url, self.place = url, 0
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=60) as answer:
            self.size = int(answer.headers["Content-Length"])

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.place, os.SEEK_END: self.size}[whence]
        return self.place

    def readinto(self, buffer: memoryview) -> int:
        last = min(self.place + len(buffer), self.size) - 1
        if last < self.place:
            return 0
        asked = urllib.request.Request(self.url, headers={"Range": f"bytes={self.place}-{last}"})
        with urllib.request.urlopen(asked, timeout=60) as answer:
            if answer.status != 206:  # the whole of it would come
                raise OSError(f"{self.url} does not answer range requests")
            text = answer.read()
        buffer[: len(text)] = text
        self.place += len(text)
        return len(text)


def wheel_url(requirement: str) -> str:
    """Where pip would get this from, without getting it."""
    asked = ["install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps", "--only-binary", ":all:"]
    command = [sys.executable, "-m", "pip", *asked, "--report", "-", requirement]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if answer.returncode:
        raise OSError(f"pip finds no wheel of {requirement}: {answer.stderr.strip()}")
    url: str = json.loads(answer.stdout)["install"][0]["download_info"]["url"]
    return url


def fetch(requirement: str, paths: Iterable[str]) -> dict[str, bytes]:
    """These files of a wheel, and its RECORD, METADATA and the engine's _version.py where it has one."""
    folder = CACHE / requirement
    wanted = list(paths)
    if not (folder / "complete").is_file() or not all((folder / path).is_file() for path in wanted):
        _download(requirement, wanted, folder)
    kept = [path for path in folder.rglob("*") if path.is_file() and path.name != "complete"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in kept}


def _download(requirement: str, paths: list[str], folder: Path) -> None:
    with zipfile.ZipFile(io.BufferedReader(Remote(wheel_url(requirement)), 1 << 18)) as wheel:
        record = next(name for name in wheel.namelist() if name.endswith(".dist-info/RECORD"))
        hashes = dict(
            line.rsplit(",", 1)[0].rsplit(",", 1) for line in wheel.read(record).decode().splitlines() if line
        )
        engine = paths[0].split("/")[0]
        others = (record, record.replace("RECORD", "METADATA"), f"{engine}/_version.py", f"{engine}/__init__.py")
        for path in (*paths, *(name for name in others if name in wheel.namelist())):
            text = wheel.read(path)
            digest = "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(text).digest()).decode().rstrip("=")
            if path != record and hashes[path] != digest:
                raise OSError(f"{path} of {requirement} is not what its RECORD says")
            place = folder / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(text)
    (folder / "complete").touch()
