"""Finds out when a forward ends: then one system call writes the call counts of all layers to the report.

The layers of a model are called in a fixed order. When a layer is called for the second time, a new forward has begun,
so the layer called just before it ends a forward: from then on the counts are written as soon as that layer is called.
A layer that has not been judged yet may end a forward, so its calls are written at once. If layers come in no fixed
order, a process that is killed may lose the last call of each layer.
"""

from __future__ import annotations

from dataclasses import dataclass

from norm_plugin.engines import report_file


@dataclass(eq=False, kw_only=True)
class InTurn(report_file.Counted):
    """What is called in turn: a layer's calls, or a CUDA graph.

    `forward`: the number of the forward in which it was last called. `ends`: whether it ends a forward, None as long
    as that is unknown.
    """

    forward: int = 0
    ends: bool | None = None


now = 1
_latest = InTurn()
_written = _latest


def called(one: InTurn) -> None:
    """Note that `one` was called, and write the counts if that may have ended a forward."""
    global now, _latest, _written
    before = _latest
    late = False
    if one.forward == now:
        now += 1
        before.ends = True
        late = before is not _written
    elif one.ends is False:  # in the middle of a forward, as nearly all calls are
        one.forward = now
        _latest = one
        return
    elif before.ends is None:
        before.ends = False
    one.forward = now
    _latest = one
    if late or one.ends is not False:
        alone = before is _written
        _written = one
        report_file.write_counts(one if alone else None)
