"""What one run of an engine answered: what `norm-plugin verify` compares, as the child process writes it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Answer:
    """The greedy answer to one prompt: tokens, the logprob of each, and those of the best tokens at each position."""

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    top: list[dict[str, float]]


@dataclass
class Outcome:
    """One model in one engine under one setting of the flags. `rows` are the counts of calls of every process."""

    engine: str
    version: str
    model: str
    dtype: str
    device: str
    mode: str
    flags: dict[str, str]
    answers: list[Answer]
    rows: list[dict[str, Any]] = field(default_factory=list)
    hooks: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def calls(self, op: str, reason: str | None = "") -> int:
        """How often ours ran `op`; with a reason, how often the engine's own did for it; with None, all together."""
        return sum(row["calls"] for row in self.rows if row["op"] == op and reason in (None, row["reason"]))


def write(outcomes: list[Outcome], path: Path) -> None:
    """Write the file of a child process. If the disk is full, the file stays as it was."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps([asdict(outcome) for outcome in outcomes]))
    new.replace(path)


def read(path: Path) -> list[Outcome]:
    return [
        Outcome(**{**fields, "answers": [Answer(**answer) for answer in fields["answers"]]})
        for fields in json.loads(path.read_text())
    ]
