"""CUDA graphs: which calls were captured into each, and how often it was replayed.

Python does not run during a replay. So the calls are counted while a graph is captured, and each graph counts its
replays. Graphs that hold the same calls (one layer at fifty batch sizes) share one count.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch

from norm_plugin.engines import forwards
from norm_plugin.engines.installed_hooks import InstalledHooks
from norm_plugin.engines.report_file import Counted

#: Where a torch.cuda.CUDAGraph keeps its Graph.
_ATTRIBUTE = "_norm_plugin_graph"


@dataclass(eq=False)
class Graph(Counted):
    """A captured graph: `held` says how often each layer is called in it; its own `calls` are its replays."""

    held: dict[Any, int]


_graphs: dict[frozenset[tuple[Any, int]], Graph] = {}
_hooks: InstalledHooks | None = None


def captured() -> tuple[Graph, ...]:
    return tuple(_graphs.values())


def follow(begin: Callable[[], None], end: Callable[[], dict[Any, int]], changed: Callable[[], None]) -> None:
    """Call `begin` and `end` around every capture, and then `changed`. `end` returns the calls that were captured."""
    global _hooks
    if _hooks is not None:
        return
    _hooks = InstalledHooks("torch", torch.__version__)

    def ending(original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def capture_end(graph: Any, *args: Any, **kwargs: Any) -> Any:
            calls = end()
            result = original(graph, *args, **kwargs)
            setattr(graph, _ATTRIBUTE, _graphs.setdefault(frozenset(calls.items()), Graph(calls)))
            changed()
            return result

        return capture_end

    def replayed(result: None, graph: Any) -> None:
        known: Graph | None = getattr(graph, _ATTRIBUTE, None)
        if known is not None:
            known.calls += 1
            if known.place >= 0:
                forwards.called(known)

    _hooks.after("capture_begin", torch.cuda.CUDAGraph, "capture_begin", lambda *call, **named: begin())
    _hooks.replace("capture_end", torch.cuda.CUDAGraph, "capture_end", ending)
    _hooks.after("replay", torch.cuda.CUDAGraph, "replay", replayed)


def forget() -> None:
    """Stop following captures, and forget all graphs."""
    global _hooks
    if _hooks is not None:
        _hooks.undo()
        _hooks = None
    _graphs.clear()
