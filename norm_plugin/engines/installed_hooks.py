"""What an adapter changed in its engine, what it could not change and why, and how to take it back."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from types import ModuleType
from typing import Any

_ABSENT = object()


@dataclass
class InstalledHooks:
    """The hooks of one engine in this process: `live` says where each one is, `missing` why it could not be set."""

    engine: str
    version: str
    live: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    _undo: list[Callable[[], None]] = field(default_factory=list)

    def replace(self, hook: str, owner: Any, name: str, make: Callable[[Any], Any]) -> bool:
        """Replace `owner.name` by make(the original). A name that does not exist is a missing hook, not an error."""
        before = inspect.getattr_static(owner, name, _ABSENT)
        if before is _ABSENT:
            self.missing[hook] = f"{_name_of(owner)} has no {name}"
            return False
        own = name in vars(owner)  # an inherited attribute is deleted again, so that no copy of it stays behind
        setattr(owner, name, make(getattr(owner, name)))
        self.on_undo(lambda: setattr(owner, name, before) if own else delattr(owner, name))
        self.live[hook] = f"{_name_of(owner)}.{name}"
        return True

    def replace_method(self, module: ModuleType, layer: str, method: str, make: Callable[[Any], Any]) -> bool:
        """Replace the method of a layer's class; a class that the module does not have is a missing hook."""
        owner = getattr(module, layer, None)
        if owner is None:
            self.missing[layer] = f"{module.__name__} has no {layer}"
            return False
        return self.replace(layer, owner, method, make)

    def after(self, hook: str, owner: Any, name: str, do: Callable[..., None]) -> bool:
        """Call `do` with the result and the arguments of every call of `owner.name`."""

        def make(original: Callable[..., Any]) -> Callable[..., Any]:
            @wraps(original)
            def followed(*args: Any, **named: Any) -> Any:
                result = original(*args, **named)
                do(result, *args, **named)
                return result

            return followed

        return self.replace(hook, owner, name, make)

    def on_undo(self, undo: Callable[[], None]) -> None:
        """Call `undo` when the hooks are taken back."""
        self._undo.append(undo)

    def undo(self) -> None:
        """Restore everything, the last change first."""
        while self._undo:
            self._undo.pop()()
        self.live.clear()

    def line(self) -> str:
        """What is hooked, as one line for the log."""
        live = " ".join(f"{hook}={where}" for hook, where in self.live.items()) or "nothing"
        return f"{self.engine} {self.version}: {live}"


#: The hooks of this process, by the engine's package.
installed: dict[str, InstalledHooks] = {}


def undo(engine: str) -> None:
    """Restore the engine, if it is hooked."""
    if hooks := installed.pop(engine, None):
        hooks.undo()


def _name_of(owner: Any) -> str:
    return str(getattr(owner, "__qualname__", None) or getattr(owner, "__name__", owner))
