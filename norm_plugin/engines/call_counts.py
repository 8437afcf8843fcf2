"""Counts calls by layer, by op, and by the reason if the engine's own norm ran.

A layer is known by the address of its weight, because an op inside the engine sees tensors and no module. With
NORM_PLUGIN_REPORT the counts are written to a file as calls happen (`report_file`), and replays of CUDA graphs are
counted (`graphs`); without it a call inside a graph is counted once, when it is captured.
"""

from __future__ import annotations

import json
import os
import threading
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from torch import Tensor, nn

from norm_plugin import dispatch, settings
from norm_plugin.engines import forwards, graphs, implementations, report_file
from norm_plugin.engines.installed_hooks import installed
from norm_plugin.engines.model_layers import Layer, Why, norms

#: More than any model has. Weights that are new in every call would fill the memory.
MOST_ROWS = 2048
BEYOND = f"(beyond the first {MOST_ROWS} layers)"

#: The op of an all-reduce that is left to the engine, before a norm.
ALLREDUCE = "allreduce"

Key = tuple[str, int, str]

#: The reason for a layer that has a hook.
NOT_CALLED = "not called so far"


@dataclass(eq=False)
class Row(report_file.Counted):
    """The calls of one op by one layer that were left to the engine for one reason, or that ours ran (reason "").

    `inputs`: the (dtype, width, strides) seen at calls 1, 2, 4, 8 and so on. `text`: its JSON, and when that was made.
    """

    op: str
    weight: int
    reason: str
    inputs: list[implementations.Input] = field(default_factory=list)
    text: tuple[tuple[int, int], str] = ((-1, 0), "")

    @property
    def layer(self) -> tuple[str, str]:
        """The layer's path in the model and its class."""
        return _layers[self.weight][:2] if self.weight in _layers else ("", "")

    def replayed(self) -> int:
        """How many calls were made by replays of CUDA graphs."""
        return sum(graph.calls * graph.held.get(self, 0) for graph in graphs.captured())


_rows: dict[Key, Row] = {}
_counting = _rows  # another dict while a CUDA graph is captured
_layers: dict[int, Layer] = {}  # by the address of the weight
_known: dict[Layer, None] = {}  # all layers, each once
_models: list[str] = []
_lock = threading.RLock()
_reported: bool | None = None  # None: not begun; False: no report is wanted, or it cannot be written
_changes = 0  # of what runs the layers, or of their names


def count(op: str, x: Tensor, weight: Tensor | None, reason: str = "") -> None:
    """Count one call of `op` on x: ours runs it, or the engine's own does for this reason."""
    row = _counting.get((op, 0 if weight is None else weight.data_ptr(), reason))
    if row is None:
        row = _new_row(op, 0 if weight is None else weight.data_ptr(), reason)
    calls = row.calls = row.calls + 1
    if row.place >= 0:
        forwards.called(row)
    if not calls & (calls - 1):
        _note_input(row, x)


def _new_row(op: str, weight: int, reason: str) -> Row:
    with _lock:
        _begin_report()
        if len(_rows) >= MOST_ROWS:
            op, weight = BEYOND, 0
        key = (op, weight, reason)
        return _counting.setdefault(key, Row(*key))


def _note_input(row: Row, x: Tensor) -> None:
    """Note what the input is like, and write the report anew if that is new or if the file was damaged."""
    seen = (str(x.dtype).removeprefix("torch."), x.shape[-1], tuple(x.stride()))
    new = seen not in row.inputs
    if new or not report_file.is_intact():
        with _lock:
            if new:
                row.inputs.append(seen)
            _write()


def name_layers(model: nn.Module, why: Why = lambda layer: "", called: str = "") -> None:
    """Note the norms of a model that was loaded: their names, why one has no hook, and what the model is called."""
    with _lock:
        for layer in norms(model, why):
            _known[layer] = None
            if layer.weight:
                _layers.setdefault(layer.weight, layer)
        _models[:] = dict.fromkeys([*_models, f"{called or 'a model'} ({type(model).__name__})"])
        _begin_report()
        _changed()


def name_layer(layer: Layer) -> None:
    """Note the name of a layer that is no norm, whose calls are counted too."""
    with _lock:
        _layers.setdefault(layer.weight, layer)


def layers() -> tuple[Layer, ...]:
    return tuple(_known)


def rows() -> tuple[Row, ...]:
    return tuple(_rows.values())


def calls(op: str, reason: str | None = "") -> int:
    """How often ours ran `op`; with a reason, how often the engine's own did for it; with None, the sum of all."""
    wanted = (row for row in rows() if row.op == op and reason in (None, row.reason))
    return sum(row.calls + row.replayed() for row in wanted)


def reset() -> None:
    """Forget everything. The file of a report stays."""
    global _reported, _counting
    with _lock:
        _counting = _rows
        _rows.clear()
        _layers.clear()
        _known.clear()
        _models.clear()
        graphs.forget()
        report_file.close()
        _reported = None


# --- the report ---------------------------------------------------------------------------------------------------


def facts() -> list[dict[str, Any]]:
    """All rows as plain values, and one more for each layer that was never called."""
    found = [{**_as_values(row), "calls": row.calls + row.replayed(), "replayed": row.replayed()} for row in rows()]
    return found + [{**_uncalled_as_values(layer), "calls": 0, "replayed": 0} for layer in _never_called()]


def _as_values(row: Row) -> dict[str, Any]:
    """A row as plain values, without its numbers."""
    layer, kind = row.layer
    dtype, width, _ = row.inputs[0] if row.inputs else ("", 0, ())
    return {
        "layer": layer,
        "class": kind,
        "op": row.op,
        "reason": row.reason,
        "width": width,
        "dtype": dtype,
        "strides": [list(strides) for _, _, strides in row.inputs],
        "implementations": implementations.find(row.op, row.inputs) if not row.reason else [],
    }


def _as_json(row: Row) -> str:
    """A row as JSON, made again only if it may have changed: a model's first step adds hundreds of rows."""
    version = (_changes, len(row.inputs))
    if row.text[0] != version:
        row.text = (version, json.dumps(_as_values(row)))
    return row.text[1]


def _never_called() -> list[Layer]:
    """The layers that were never called, or have no weight by which their calls could be known."""
    called = {row.weight for row in rows()}
    return [layer for layer in _known if layer.weight not in called]


@cache
def _uncalled_as_values(layer: Layer) -> dict[str, Any]:
    """The same plain values for a layer that was never called."""
    nothing: dict[str, Any] = {"op": "", "width": 0, "dtype": "", "strides": [], "implementations": []}
    return {"layer": layer.path, "class": layer.kind, "reason": layer.why or NOT_CALLED, **nothing}


def _begin_report() -> None:
    """At the first call: if a report is wanted, follow CUDA graphs and write it whenever a route changes."""
    global _reported
    if _reported is not None:
        return
    _reported = bool(settings.get().report)
    if _reported:
        graphs.follow(_capture_begins, _capture_ends, _write)
        _watch_routes()


@cache
def _watch_routes() -> None:
    dispatch.on_resolve(_changed)


def _changed() -> None:
    """Write the report anew because a layer runs on something else, or has a name now."""
    global _changes
    _changes += 1
    _write()


def _write() -> None:
    """Write the whole report anew; it is only called when more than numbers has changed."""
    global _reported
    with _lock:
        if not _reported or _counting is not _rows:
            return
        places = {row: i for i, row in enumerate(rows())}
        captured = graphs.captured()
        _reported = report_file.write(
            {"engines": _engines(), "models": _models},
            [_as_json(row) for row in places],
            [json.dumps({"calls": {places[row]: calls for row, calls in graph.held.items()}}) for graph in captured],
            [json.dumps(_uncalled_as_values(layer)) for layer in _never_called()],
            [*places, *captured],
        )


def _engines() -> list[dict[str, Any]]:
    """What is hooked in this process."""
    return [
        {"engine": hooks.engine, "version": hooks.version, "hooks": hooks.live, "missing": hooks.missing}
        for hooks in installed.values()
    ]


def _capture_begins() -> None:
    global _counting
    _counting = {}


def _capture_ends() -> dict[Row, int]:
    """The rows that were called during a capture, with the number of calls; none of them has run yet."""
    global _counting
    with _lock:
        seen, _counting = _counting, _rows
        calls: dict[Row, int] = {}
        for key, row in seen.items():
            place = _rows.setdefault(key, Row(*key))
            place.inputs += [one for one in row.inputs if one not in place.inputs]
            calls[place] = row.calls
        return calls


def _forked() -> None:
    """In a forked child: nothing has been called yet, and it writes a report of its own. It keeps the layers.

    It needs a new lock, because the thread that held the parent's may not exist in the child.
    """
    global _lock, _counting, _reported
    _lock = threading.RLock()
    _counting = _rows
    _reported = None
    report_file.forked()
    graphs.forget()
    _rows.clear()


os.register_at_fork(after_in_child=_forked)
