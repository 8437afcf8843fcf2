"""Unified diffs without context, as bytes.

A patch names the exact file it is for by its hash, so a hunk is applied at its line number; the lines that it removes
are compared all the same. Lines keep their ends, so every byte outside a hunk stays.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from norm_plugin.patching import PatchError

_HUNK = re.compile(rb"@@ -(\d+)(?:,(\d+))? \+\d+(?:,(\d+))? @@")


@dataclass(frozen=True)
class Hunk:
    """`removed` lines go, beginning after the first `after` lines of the original file; `added` lines come."""

    after: int
    removed: tuple[bytes, ...]
    added: tuple[bytes, ...]

    def meets(self, other: Hunk) -> bool:
        """Whether the two touch the same place, so that their order would matter."""
        first, second = sorted((self, other), key=lambda hunk: hunk.after)
        return second.after < first.after + len(first.removed) or second.after == first.after


@dataclass(frozen=True)
class Diff:
    """The text before the first file, and the hunks of each file by its path."""

    head: str
    files: dict[str, tuple[Hunk, ...]]


def parse(text: bytes) -> Diff:
    """A diff of one or more files, with anything before the first."""
    lines = text.splitlines(keepends=True)
    pairs = enumerate(pairwise(lines))
    starts = [i for i, (line, after) in pairs if line.startswith(b"--- ") and after.startswith(b"+++ ")]
    files = {}
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        path = lines[start + 1][4:].decode().split("\t")[0].strip().removeprefix("b/")
        files[path] = tuple(_hunks(lines[start + 2 : end]))
    return Diff(b"".join(lines[: starts[0]] if starts else lines).decode().strip(), files)


def _hunks(lines: list[bytes]) -> Iterable[Hunk]:
    i = 0
    while i < len(lines):
        header = _HUNK.match(lines[i])
        if header is None:
            raise PatchError(f"the diff has a line that belongs to no hunk: {lines[i]!r}")
        line, old, new = (1 if group is None else int(group) for group in header.groups())
        body = lines[i + 1 : i + 1 + old + new]
        removed, added = body[:old], body[old:]
        if any(not text.startswith(b"-") for text in removed) or any(not text.startswith(b"+") for text in added):
            raise PatchError(f"the hunk {lines[i].strip().decode()} is not {old} lines removed and {new} added")
        yield Hunk(line - 1 if old else line, tuple(t[1:] for t in removed), tuple(t[1:] for t in added))
        i += 1 + old + new


def apply(original: bytes, hunks: Iterable[Hunk], path: str) -> bytes:
    """The file with the hunks in it, which may be those of several patches if no two of them meet."""
    lines = original.splitlines(keepends=True)
    for hunk in sorted(hunks, key=lambda hunk: hunk.after, reverse=True):  # from the end: line numbers stay true
        end = hunk.after + len(hunk.removed)
        if tuple(lines[hunk.after : end]) != hunk.removed:
            raise PatchError(f"{path} does not have the lines {hunk.after + 1} to {end} that the patch removes")
        lines[hunk.after : end] = hunk.added
    return b"".join(lines)
