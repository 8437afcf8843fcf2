"""What an adapter changed in its engine, what it could not change and why, and the way back."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

_ABSENT = object()


@dataclass
class Record:
    """The hooks of one engine in this process."""

    engine: str
    version: str
    live: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    _back: list[Callable[[], None]] = field(default_factory=list)

    def replace(self, hook: str, owner: Any, name: str, make: Callable[[Any], Any]) -> bool:
        """Put make(the original) in the place of `owner.name`; a name that is not there is missing, not an error."""
        before = inspect.getattr_static(owner, name, _ABSENT)
        if before is _ABSENT:
            self.missed(hook, f"{_called(owner)} has no {name}")
            return False
        own = name in vars(owner)  # an inherited attribute goes away again, and is not left behind as a copy
        setattr(owner, name, make(getattr(owner, name)))
        self.on_undo(lambda: setattr(owner, name, before) if own else delattr(owner, name))
        self.live[hook] = f"{_called(owner)}.{name}"
        return True

    def on_undo(self, back: Callable[[], None]) -> None:
        """How to take something else back that was changed."""
        self._back.append(back)

    def missed(self, hook: str, reason: str) -> None:
        """A hook that this engine does not have: its own norm stays."""
        self.missing[hook] = reason

    def undo(self) -> None:
        """Everything as it was, the last change first."""
        while self._back:
            self._back.pop()()
        self.live.clear()

    def line(self) -> str:
        """What was hooked, in one line for the log."""
        live = " ".join(f"{hook}={where}" for hook, where in self.live.items()) or "nothing"
        return f"{self.engine} {self.version}: {live}"


def _called(owner: Any) -> str:
    return str(getattr(owner, "__qualname__", None) or getattr(owner, "__name__", owner))
