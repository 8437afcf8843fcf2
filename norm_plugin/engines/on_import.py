"""Calls a function with a module as soon as that module has been imported.

An adapter must replace names before the engine's models copy them out of a module. It must not import the module
itself: that takes seconds, and most processes of an engine never need it.
"""

from __future__ import annotations

import importlib.abc
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _Finder(importlib.abc.MetaPathFinder):
    """Lets the other finders find a module, and calls the functions that wait for it once its body has run."""

    def __init__(self) -> None:
        self.waiting: dict[str, list[Callable[[ModuleType], None]]] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.waiting:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    self._follow(fullname, spec.loader)
                return spec
        return None

    def _follow(self, name: str, loader: Any) -> None:
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            for do in self.waiting.pop(name, []):
                do(module)

        loader.exec_module = exec_module


_finder = _Finder()


def after_import(name: str, do: Callable[[ModuleType], None]) -> Callable[[], None]:
    """Call `do` with the module once it is imported, or now if it is already. Returns a function that cancels this."""
    module = sys.modules.get(name)
    if module is not None:
        do(module)
        return lambda: None
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    _finder.waiting.setdefault(name, []).append(do)
    return lambda: _forget(name, do)


def waiting() -> list[str]:
    """The modules that are waited for."""
    return list(_finder.waiting)


def _forget(name: str, do: Callable[[ModuleType], None]) -> None:
    waiting = _finder.waiting.get(name, [])
    if do in waiting:
        waiting.remove(do)
    if not waiting:
        _finder.waiting.pop(name, None)
    if not _finder.waiting and _finder in sys.meta_path:
        sys.meta_path.remove(_finder)
