"""A sum over ranks that is left pending: a norm may take it over, and whoever else touches it gets the sum.

A `Pending` stands for the result of an all-reduce that has not begun. A norm that comes next takes `part`, which is
what this rank adds, and does all-reduce, add and norm in one. Any other use, by torch's functions, methods and
attributes or from C++ through torch's dispatcher, has the all-reduce done first and then acts on its result. Nobody
finds the part by the tensor: it has no memory of its own, so code that asks past torch finds the address 0.

As with any collective, every rank must do the same with it, in the same order. What nobody uses is reduced on no rank.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import resolve_name
from torch.utils._pytree import tree_map_only

#: What says nothing of values. torch hands these to a subclass as it hands all others.
ABOUT_SHAPE = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "is_cuda")),
    Tensor.dim,
    Tensor.size,
    Tensor.numel,
}

#: These return what they are given, if they are given its shape.
VIEWS = (Tensor.view, Tensor.reshape)


class Pending(Tensor):
    """The sum over ranks of `part`, which `reduce` makes: it may write its argument.

    `used` is told the name of what wants the sum first. `source` is whatever its maker wants to find again. `shared`:
    another one that is pending has the same part.
    """

    part: Tensor
    reduce: Callable[[Tensor], Tensor]
    used: Callable[[str], None]
    source: Any
    shared: bool
    _sum: Tensor | None
    _lock: threading.Lock

    @staticmethod
    def __new__(
        cls, part: Tensor, reduce: Callable[[Tensor], Tensor], used: Callable[[str], None], source: Any = None
    ) -> Pending:
        self: Pending = Tensor._make_wrapper_subclass(
            cls, part.shape, strides=part.stride(), dtype=part.dtype, device=part.device
        )
        self.part, self.reduce, self.used, self.source, self.shared = part, reduce, used, source, False
        self._sum, self._lock = None, threading.Lock()
        return self

    @property
    def done(self) -> bool:
        """Whether the all-reduce has been done, so that nothing is pending any more."""
        return self._sum is not None

    def total(self, wanted_by: Callable[..., Any] | str) -> Tensor:
        """The sum. The first who wants it has it made."""
        with self._lock:  # of two threads, one; each tensor has its own lock: another all-reduce must not wait for this
            if self._sum is None:
                self.used(wanted_by if isinstance(wanted_by, str) else name_of(wanted_by))
                self._sum = self.reduce(self.part.clone() if self.shared else self.part)
        return self._sum

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in ABOUT_SHAPE and not args[0].done:  # once it is made, an operation in place may change its shape
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if func in VIEWS and not kwargs and is_same_shape(*args):
            return args[0]
        return on_sums(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return on_sums(func, args, kwargs)


def on_sums(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
    """`func` of the sums in place of what is pending."""

    def sums_in(value: Any) -> Any:
        if type(value) is Pending:
            return value.total(func)
        if isinstance(value, (list, tuple, dict)):
            return tree_map_only(Pending, sums_in, value)
        return value

    return func(*map(sums_in, args), **{name: sums_in(value) for name, value in (kwargs or {}).items()})


def name_of(func: Callable[..., Any]) -> str:
    """What torch calls a function, or a name of it."""
    return str(resolve_name(func) or getattr(func, "__name__", func)).removesuffix(".__get__")


def is_same_shape(tensor: Tensor, *size: Any) -> bool:
    """Whether a view of this size is the tensor itself."""
    sizes = size[0] if len(size) == 1 and isinstance(size[0], tuple) else size
    return type(tensor) is Pending and not tensor.done and tuple(sizes) == tuple(tensor.part.shape)
