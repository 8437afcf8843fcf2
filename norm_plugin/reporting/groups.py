"""Groups the rows of a process: layers of one kind to which the same happened are shown as one.

Names come from files of others, so all characters that could control a terminal are escaped.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby, zip_longest
from math import prod
from pathlib import Path
from typing import Any

from norm_plugin.commands.terminal import printable

OURS, ENGINES, NONE = "ran here", "left to the engine", "not called through a hook"


@dataclass
class Group:
    """Layers of one kind: of each its name, its calls, and how many of these were replayed."""

    state: str
    kind: str
    reason: str
    call: str
    how: str
    layers: list[tuple[str, int, int]] = field(default_factory=list)

    @property
    def calls(self) -> int:
        return sum(calls for _, calls, _ in self.layers)

    @property
    def replayed(self) -> int:
        """The calls of all layers that were replays of CUDA graphs."""
        return sum(replayed for _, _, replayed in self.layers)

    @property
    def name(self) -> str:
        """The names of all layers, with ranges for their numbers."""
        return " ".join(ranges([name for name, _, _ in self.layers]))

    @property
    def count(self) -> str:
        """The numbers of layers and calls, in words."""
        words = f"{len(self.layers)} layer{'s' * (len(self.layers) > 1)}"
        if self.state == NONE:
            return words
        words += f", {self.calls} call{'s' * (self.calls != 1)}"
        return f"{words}, {self.replayed} of them in CUDA graphs" if self.replayed else words

    @property
    def facts(self) -> list[str]:
        """What else is known, the most important first."""
        what = self.reason if self.state != OURS else f"runs on {self.how}" if self.how else ""
        return [fact for fact in (what, self.call, self.kind) if fact]


def groups(rows: Iterable[dict[str, Any]]) -> list[Group]:
    """The rows in groups, those that ran here first."""
    found: dict[tuple[Any, ...], Group] = {}
    for row in rows:
        state = NONE if not row["op"] else ENGINES if row["reason"] else OURS
        reason = row["reason"] or ("not called so far" if state == NONE else "")
        shapes = " ".join(str(tuple(strides)) for strides in row["strides"])
        call = f"{row['op']} of {row['dtype']}, width {row['width']}, strides {shapes}" if row["width"] else row["op"]
        how = "; ".join(dict.fromkeys(map(_how, row["implementations"])))
        name = row["layer"] or "(a call that no layer's weight belongs to)"
        key = [printable(text) for text in (state, row["class"], reason, call, how)]
        group = found.setdefault((*key, _shape(name)), Group(*key))  # type: ignore[arg-type]
        group.layers.append((printable(name), row["calls"], row["replayed"]))
    return sorted(found.values(), key=lambda group: (OURS, ENGINES, NONE).index(group.state))


def _how(entry: dict[str, str]) -> str:
    because = f" ({entry['because']})" if entry["because"] else ""
    return ", ".join(filter(None, (f"{entry['backend']}{because}", f"numerics {entry['numerics']}",
                                   entry["configuration"])))  # fmt: skip


#: The number of a layer, 0 to 999999999; 007 is no number but part of a name.
_NUMBER = re.compile(r"(?<![0-9])(?:0|[1-9][0-9]{0,8})(?![0-9])")


def _shape(name: str) -> tuple[str, ...]:
    """The name without its numbers."""
    return tuple(_NUMBER.split(name))


def ranges(names: Sequence[str]) -> list[str]:
    """Names that differ only in their numbers become one: model.layers.{0-35}.norm."""
    found: dict[tuple[str, ...], list[list[int]]] = {}
    for name in names:
        found.setdefault(_shape(name), []).append([int(number) for number in _NUMBER.findall(name)])
    written: list[str] = []
    for shape, numbers in found.items():
        columns = [sorted(set(column)) for column in zip(*numbers, strict=True)]
        if prod(map(len, columns)) != len({*map(tuple, numbers)}):  # a range would name layers that do not exist
            written += [_filled(shape, map(str, one)) for one in numbers]
        else:
            written.append(_filled(shape, map(_one_or_range, columns)))
    return written


def _filled(shape: Sequence[str], numbers: Iterable[str]) -> str:
    return "".join(part for pair in zip_longest(shape, numbers, fillvalue="") for part in pair)


def _one_or_range(numbers: list[int]) -> str:
    neighbours = groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    runs = [[number for _, number in run] for _, run in neighbours]
    words = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return words[0] if words == [str(numbers[0])] else "{" + ",".join(words) + "}"


# --- a process ----------------------------------------------------------------------------------------------------


def title(process: dict[str, Any]) -> str:
    """The engines of a process, or a word for none."""
    return printable(
        ", ".join(f"{e['engine']} {e['version']}" for e in process["engines"]) or "no engine that is hooked"
    )


def summary(process: dict[str, Any]) -> str:
    """The layers and calls of a process, in one line."""
    found = groups(process["rows"])
    ours = [group for group in found if group.state == OURS]
    taken = {name for group in ours for name, _, _ in group.layers}
    said = [f"{sum(g.calls for g in ours)} calls in {len(taken)} layers ran here"]
    said += [f"{sum(g.calls for g in found if g.state == ENGINES)} were left to the engine"]
    reasons: Counter[str] = Counter()
    for group in found:
        if group.state == NONE:
            reasons[group.reason] += len(group.layers)
    for reason, number in reasons.items():
        is_sentence = reason.startswith(("compiled by", "not called"))
        said.append(f"{number} layer{'s' * (number > 1)} {reason if is_sentence else f'not taken: {reason}'}")
    return "; ".join(said) + "."


def about(process: dict[str, Any]) -> list[tuple[str, str]]:
    """What a reader who was not there wants to know about a process."""
    found = [("command line", process.get("started as", process["command"]))]
    found.append(("model", ", ".join(process.get("models", []))))
    if "pid" in process:
        state = "runs" if Path(f"/proc/{process['pid']}").exists() else "has ended"
        named = "" if " " in process["command"] else f"{process['command']}, "  # by its engine
        found.append(("process", f"{named}{process['pid']} on {process['host']}"))
        found.append(("began", f"{process['started']}; if on this host, it {state}"))
    found.append(("versions", ", ".join(f"{name} {what}" for name, what in process.get("versions", {}).items()
                                        if name not in ("GPU", "driver"))))  # fmt: skip
    gpu, driver = (process.get("versions", {}).get(name, "") for name in ("GPU", "driver"))
    found.append(("GPU", f"{gpu}, driver {driver}" if driver else gpu))
    found.append(("flags", " ".join(f"{name}={value}" for name, value in process["flags"].items())))
    for engine in process["engines"]:
        found += [("missing hook", f"{hook}: {reason}") for hook, reason in engine["missing"].items()]
    return [(name, printable(what)) for name, what in found if what]
