"""Guard bands: every tensor of a call lies in a larger buffer, and the rest of the buffer must keep its bits.

Guard bands show each write before, after or between the rows of a tensor, up to BAND elements away; a write to a tensor
that may only be read; and a read beside a tensor, because the rest is NaN and a NaN reaches the result. Outputs that an
op allocates lie in such buffers too: `fresh` replaces torch.empty, empty_like, empty_strided, Tensor.new_empty and
new_empty_strided, and keeps the strides. running.py asserts that the outputs of kernels lie there, so no allocation is
missed.

They do not show a write further away than BAND elements (compute-sanitizer does, with `banded(False)`), a write of the
bits that were there already, a read whose value is not used, and what torch allocates for itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from norm_plugin.native import rms

BAND = 4096  # elements; a multiple of every alignment
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

#: Modules of norm_plugin that hold one of these functions by a name of their own.
HELD = (rms.new_output,)

_empty = torch.empty
_band = BAND


@contextmanager
def banded(bands: bool) -> Iterator[None]:
    """banded(False) ends buffers where their tensors end, so that a memory checker sees each access beyond."""
    global _band
    before, _band = _band, BAND if bands else 0
    try:
        yield
    finally:
        _band = before


@lru_cache(maxsize=512)
def pattern(size: int, itemsize: int, device: torch.device) -> Tensor:
    """The filling of a buffer: NaNs in fp16, bf16 and fp32, each with other bits than its neighbours."""
    at = torch.arange(size)
    if itemsize == 1:
        filled = 160 + at % 31
    else:
        filled = (0xFF81 + at % 113 << 8 * itemsize - 16) + (at % 251 if itemsize > 2 else 0)
        filled = filled - (1 << 8 * itemsize) if itemsize < 8 else filled
    return filled.to(BITS[itemsize]).to(device)


def extent(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """The elements from the first one of a tensor to its last."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


@lru_cache(maxsize=512)
def places(shape: tuple[int, ...], strides: tuple[int, ...], device: torch.device) -> Tensor:
    """The places of the elements in memory, each once."""
    there = torch.zeros(extent(shape, strides), dtype=torch.bool)
    if len(there):
        there[torch.arange(len(there)).as_strided(shape, strides)] = True
    return there.nonzero().flatten().to(device)


class Buffer:
    """Memory of one dtype, its bits before the call, and the tensors in it."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.band = _band
        self.raw = pattern(2 * self.band + size, dtype.itemsize, device).clone()
        self.before = self.raw
        self.inside: dict[str, Tensor] = {}

    def tensor(self, name: str, shape: tuple[int, ...], strides: tuple[int, ...], offset: int = 0) -> Tensor:
        """A tensor in the buffer, `offset` elements after the first band. For autograd it is no view."""
        self.inside[name] = self.band + offset + places(shape, strides, self.raw.device)
        made = _empty(0, dtype=self.dtype, device=self.raw.device)
        return made.set_(self.raw.untyped_storage(), self.band + offset, shape, strides)

    def fill(self, name: str, values: Tensor) -> None:
        """One value for each place of a tensor."""
        self.raw[self.inside[name]] = values.to(self.dtype).to(self.raw.device).view(self.raw.dtype)

    def seal(self) -> None:
        """Remembers the bits. Later changes count."""
        self.before = self.raw.clone()

    def check(self, *written: str) -> None:
        """Asserts that only the written tensors have changed."""
        allowed = self.before.clone()
        for name in written:
            if name in self.inside:
                allowed[self.inside[name]] = self.raw[self.inside[name]]
        if not torch.equal(allowed, self.raw):
            changed = (allowed != self.raw).nonzero().flatten()
            raise AssertionError(
                f"guard: {len(changed)} elements of the memory around {', '.join(self.inside)} changed, the first "
                f"{int(changed[0]) - self.band}, the last {int(changed[-1]) - self.band} from its beginning; "
                f"the tensors end at {len(self.raw) - 2 * self.band}"
            )


class Fresh:
    """The buffers of the tensors that an op allocated."""

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []

    def carved(self, asked: Tensor) -> Tensor:
        """A tensor in a buffer, like the one that torch made."""
        if type(asked) is not Tensor or asked.device.type == "meta" or asked.numel() == 0:
            return asked
        shape, strides = tuple(asked.shape), tuple(asked.stride())
        buffer = Buffer(extent(shape, strides), asked.dtype, asked.device)
        made = buffer.tensor("an output", shape, strides)
        buffer.seal()
        self.buffers.append(buffer)
        return made

    def guards(self, t: Tensor) -> bool:
        """Whether a tensor lies in one of the buffers, or has no elements. Always True without bands."""
        return (
            not _band
            or t.numel() == 0
            or any(t.untyped_storage().data_ptr() == b.raw.untyped_storage().data_ptr() for b in self.buffers)
        )

    def check(self) -> None:
        """Asserts that nothing was written beside the allocated tensors."""
        for buffer in self.buffers:
            buffer.check("an output")


_making: Fresh | None = None


def _replaced(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """One of torch's functions. While there is a Fresh, its tensors lie in buffers. A launch that is bound meanwhile
    keeps this function, so it must work for ever."""

    def made(*args: Any, **named: Any) -> Tensor:
        asked = function(*args, **named)
        return asked if _making is None else _making.carved(asked)

    return made


_FUNCTIONS = {name: _replaced(getattr(torch, name)) for name in ("empty", "empty_like", "empty_strided")}
_METHODS = {name: _replaced(getattr(torch.Tensor, name)) for name in ("new_empty", "new_empty_strided")}


@contextmanager
def fresh() -> Iterator[Fresh]:
    """Puts every allocation in the block between bands. Launches must be bound inside the block too."""
    global _making
    made = Fresh()
    if not _band:
        yield made
        return
    states = [held.__reduce__()[2] for held in HELD]
    with mock.patch.multiple(torch, **_FUNCTIONS), mock.patch.multiple(torch.Tensor, **_METHODS):
        _making = made
        try:
            for held, (_, *rest) in zip(HELD, states, strict=True):
                held.__setstate__((_FUNCTIONS["empty_like"], *rest))
            yield made
        finally:
            _making = None
            for held, state in zip(HELD, states, strict=True):
                held.__setstate__(state)
