"""Finds out when a forward ends: then one system call writes the call counts of all layers to the report.

The layers of a model are called in a fixed order. When a layer is called for the second time, a new forward has begun,
so the layer called just before it ends a forward: from then on the counts are written as soon as that layer is called.
A layer that has not been judged yet may end a forward, so its calls are written at once. If layers come in no fixed
order, a process that is killed may lose the last call of each layer.
"""

from __future__ import annotations

from norm_plugin.engines import report_file
from norm_plugin.engines.report_file import Counted

now = 1
_latest = Counted()
_written = _latest


def called(one: Counted) -> None:
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
