"""When a forward ends: the moment at which the numbers of calls are written, by one system call for all layers.

Layers are called in turn. Where one is called a second time another forward has begun, and the layer before it is
known to end one: the next time the numbers are written as soon as it is called. One of which nothing is known may end
a forward. Where layers come in no order, the last calls before a process is killed may be missing: of each layer one.
"""

from __future__ import annotations

from dataclasses import dataclass

from norm_plugin.engines import report_file


@dataclass(eq=False, kw_only=True)
class InTurn(report_file.Counted):
    """What is called in turn: a row of the counts, or a CUDA graph.

    `forward` is the one in which it was called last; `ends`: whether one ends with it, None where nobody knows yet.
    """

    forward: int = 0
    ends: bool | None = None


now = 1
_latest = InTurn()
_written = _latest


def called(one: InTurn) -> None:
    """The number of `one` has risen."""
    global now, _latest, _written
    before = _latest
    late = False
    if one.forward == now:
        now += 1
        before.ends = True
        late = before is not _written
    elif one.ends is False:  # in the middle of a forward: the way of nearly all calls
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
        report_file.put(one if alone else None)
