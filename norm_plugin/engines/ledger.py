"""Who normalized: calls by layer, op and, where the engine's own norm was kept, the reason.

A layer is known by where its weight lies, because an op inside the engine sees tensors and no module.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class Row:
    """One layer, one op, and one reason for not having taken it ("" where ours ran)."""

    op: str
    reason: str
    width: int
    dtype: torch.dtype
    stride: tuple[int, ...]
    weight: int
    calls: int = 0

    @property
    def layer(self) -> tuple[str, str]:
        """The layer's name in the model and its class."""
        return _layers.get(self.weight, ("", ""))


_rows: dict[tuple[str, int, str, int], Row] = {}
_layers: dict[int, tuple[str, str]] = {}


def count(op: str, x: Tensor, weight: Tensor | None, reason: str = "") -> None:
    """One call of `op` on x: ours ran it, or the engine's own did for this reason."""
    place = 0 if weight is None else weight.data_ptr()
    key = (op, place, reason, x.shape[-1])
    row = _rows.get(key)
    if row is None:
        row = _rows[key] = Row(op, reason, x.shape[-1], x.dtype, x.stride(), place)
    row.calls += 1


def name_layers(model: nn.Module) -> None:
    """Learn the names of the layers of a model that is loaded."""
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.numel() and not weight.is_meta:
            _layers.setdefault(weight.data_ptr(), (name, type(module).__name__))


def rows() -> tuple[Row, ...]:
    """All rows of this process."""
    return tuple(_rows.values())


def calls(op: str, reason: str | None = "") -> int:
    """How often ours ran `op`; with a reason, how often the engine's own did for it; with None, all together."""
    return sum(row.calls for row in _rows.values() if row.op == op and reason in (None, row.reason))


def reset() -> None:
    """Forget everything."""
    _rows.clear()
    _layers.clear()
