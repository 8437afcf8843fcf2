"""Who normalized: calls by layer, op and, where the engine's own norm was kept, the reason.

A layer is known by where its weight lies, because an op inside the engine sees tensors and no module. With
NORM_PLUGIN_REPORT all of it is in a file too, as it happens (`report_file`), and CUDA graphs are followed (`graphs`):
without it a call inside a graph is counted when it is captured, and not when it is replayed.
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

#: More than any model has norms; a weight that is made anew for every call would fill the memory.
MOST_ROWS = 2048
BEYOND = f"(beyond the first {MOST_ROWS} layers)"

Key = tuple[str, int, str]


#: The reason of a layer that a hook would meet.
NOT_CALLED = "not called so far"


@dataclass(eq=False)
class Row(forwards.InTurn):
    """One layer, one op, and one reason for not having taken it ("" where ours ran).

    `inputs` are the (dtype, width, strides) that were seen at calls 1, 2, 4, 8 and so on.
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

    @property
    def dtype(self) -> str:
        """Of the first input."""
        return self.inputs[0][0] if self.inputs else ""

    @property
    def width(self) -> int:
        """Of the first input."""
        return self.inputs[0][1] if self.inputs else 0

    @property
    def stride(self) -> tuple[int, ...]:
        """Of the first input."""
        return self.inputs[0][2] if self.inputs else ()

    def replayed(self) -> int:
        """How many more calls replays of CUDA graphs have made."""
        return sum(graph.calls * graph.held.get(self, 0) for graph in graphs.captured())


_rows: dict[Key, Row] = {}
_counting = _rows  # other ones while a CUDA graph is captured
_layers: dict[int, Layer] = {}  # by where the weight lies
_known: dict[Layer, None] = {}  # all of them, each once
_models: list[str] = []
_lock = threading.RLock()
_reported: bool | None = None  # None: not begun; False: none is wanted, or none can be written
_changes = 0


def count(op: str, x: Tensor, weight: Tensor | None, reason: str = "") -> None:
    """One call of `op` on x: ours runs it, or the engine's own does for this reason."""
    row = _counting.get((op, 0 if weight is None else weight.data_ptr(), reason))
    if row is None:
        row = _open(op, 0 if weight is None else weight.data_ptr(), reason)
    calls = row.calls = row.calls + 1
    if row.place >= 0:
        forwards.called(row)
    if not calls & (calls - 1):
        _look(row, x)


def _open(op: str, weight: int, reason: str) -> Row:
    with _lock:
        _begin()
        if len(_rows) >= MOST_ROWS:
            op, weight = BEYOND, 0
        key = (op, weight, reason)
        return _counting.setdefault(key, Row(*key))


def _look(row: Row, x: Tensor) -> None:
    """Learn what the row's inputs are like, and whether somebody has damaged the report: then it is written anew."""
    seen = (str(x.dtype).removeprefix("torch."), x.shape[-1], tuple(x.stride()))
    new = seen not in row.inputs
    if new or not report_file.whole():
        with _lock:
            if new:
                row.inputs.append(seen)
            _write()


def name_layers(model: nn.Module, why: Why = lambda layer: "", called: str = "") -> None:
    """Learn the norms of a model that is loaded: their names, why a hook will not meet one, and what the model is."""
    with _lock:
        for layer in norms(model, why):
            _known[layer] = None
            if layer.weight:
                _layers.setdefault(layer.weight, layer)
        _models[:] = dict.fromkeys([*_models, f"{called or 'a model'} ({type(model).__name__})"])
        _begin()
        _changed()


def layers() -> tuple[Layer, ...]:
    """All norms of the models that were loaded."""
    return tuple(_known)


def rows() -> tuple[Row, ...]:
    """All rows of this process."""
    return tuple(_rows.values())


def calls(op: str, reason: str | None = "") -> int:
    """How often ours ran `op`; with a reason, how often the engine's own did for it; with None, all together."""
    wanted = (row for row in rows() if row.op == op and reason in (None, row.reason))
    return sum(row.calls + row.replayed() for row in wanted)


def reset() -> None:
    """Forget everything. A report that has been written stays as it is."""
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
    """The rows as plain values, and one for each layer that nobody has called."""
    found = [{**_fact(row), "calls": row.calls + row.replayed(), "replayed": row.replayed()} for row in rows()]
    return found + [{**_nothing(layer), "calls": 0, "replayed": 0} for layer in _silent()]


def _fact(row: Row) -> dict[str, Any]:
    """Everything but the numbers."""
    layer, kind = row.layer
    return {
        "layer": layer,
        "class": kind,
        "op": row.op,
        "reason": row.reason,
        "width": row.width,
        "dtype": row.dtype,
        "strides": [list(strides) for _, _, strides in row.inputs],
        "implementations": implementations.find(row.op, row.inputs) if not row.reason else [],
    }


def _text(row: Row) -> str:
    """_fact as JSON, made again only where it may have changed: a model's first step brings rows by the hundred."""
    version = (_changes, len(row.inputs))
    if row.text[0] != version:
        row.text = (version, json.dumps(_fact(row)))
    return row.text[1]


def _silent() -> list[Layer]:
    """The layers that nobody has called, or whose calls cannot be told from others' because they have no weight."""
    called = {row.weight for row in rows()}
    return [layer for layer in _known if layer.weight not in called]


@cache
def _nothing(layer: Layer) -> dict[str, Any]:
    """_fact of a layer that nobody has called."""
    nothing: dict[str, Any] = {"op": "", "width": 0, "dtype": "", "strides": [], "implementations": []}
    return {"layer": layer.path, "class": layer.kind, "reason": layer.why or NOT_CALLED, **nothing}


def _begin() -> None:
    """The first time: follow CUDA graphs and open the report, if one is wanted."""
    global _reported
    if _reported is not None:
        return
    _reported = bool(settings.get().report)
    if _reported:
        graphs.follow(_capture_begins, _capture_ends, _write)
        if not _hooked:
            _hooked.append(True)
            dispatch.on_resolve(_changed)


_hooked: list[bool] = []


def _changed() -> None:
    """What runs a layer, or what it is called, is no longer what it was."""
    global _changes
    _changes += 1
    _write()


def _write() -> None:
    """The whole report anew: only when something but a number has changed."""
    global _reported
    with _lock:
        if not _reported or _counting is not _rows:
            return
        places = {row: i for i, row in enumerate(rows())}
        captured = graphs.captured()
        _reported = report_file.write(
            {"engines": _engines(), "models": _models},
            [_text(row) for row in places],
            [json.dumps({"calls": {places[row]: calls for row, calls in graph.held.items()}}) for graph in captured],
            [json.dumps(_nothing(layer)) for layer in _silent()],
            [*places, *captured],
        )


def _engines() -> list[dict[str, Any]]:
    """What the adapters of this process changed."""
    return [
        {"engine": hooks.engine, "version": hooks.version, "hooks": hooks.live, "missing": hooks.missing}
        for hooks in installed.values()
    ]


def _capture_begins() -> None:
    global _counting
    _counting = {}


def _capture_ends() -> dict[Row, int]:
    """The rows that were called while a graph was captured; what was captured has not run."""
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
    """A child has locks and a report of its own, and has called nothing yet; its layers are its parent's.

    The parent's lock may have been held by a thread that the child does not have.
    """
    global _lock, _counting, _reported
    _lock = threading.RLock()
    _counting = _rows
    _reported = None
    report_file.forked()
    graphs.forget()
    _rows.clear()


os.register_at_fork(after_in_child=_forked)
