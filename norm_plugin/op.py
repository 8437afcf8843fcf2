"""An op: its native function and the roles of its arguments. `library.declare` makes one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from norm_plugin.numerics import Numerics


@dataclass(eq=False)
class Op:
    """One op. The roles are places among `arguments`: `x` is normalized, `by_element` have the shape of x, `one_a_row`
    have one number for each row of x, and `written` are written in place."""

    name: str
    kind: str
    native: Callable[..., Any]
    arguments: tuple[str, ...]
    defaults: tuple[Any, ...]
    rules: Mapping[str, Callable[..., None]]  # the check of each argument, by its name
    x: int
    by_element: tuple[int, ...]
    one_a_row: tuple[int, ...]
    written: tuple[int, ...]
    tensors: frozenset[str]
    required: frozenset[str]
    may_be: tuple[int, ...]  # an argument that is written, and the one whose memory it may be
    numerics: Mapping[str, Numerics]
    recorded: Callable[..., Any] | None = None  # for an op that writes: does the same by ops with gradients
    plans: tuple[Any, ...] = ()

    @cached_property
    def by_row(self) -> tuple[bool, ...]:
        """For each argument, whether it has a row for each row of x."""
        return tuple(i == self.x or i in self.by_element or i in self.one_a_row for i in range(len(self.arguments)))

    @cached_property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """Each written argument with each other tensor argument; two written ones are one pair."""
        others = [i for i, name in enumerate(self.arguments) if name in self.tensors]
        return tuple((i, j) for i in self.written for j in others if j != i and not (j in self.written and j < i))

    def complete(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """All arguments. torch's dispatcher leaves out trailing ones that equal their defaults."""
        return args + self.defaults[len(args) :]
