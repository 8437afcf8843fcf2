"""Guard bands: every tensor of a call lies in a larger buffer, and the rest of the buffer must keep its bits.

What this sees: each write beside a tensor, before it, after it or between its rows, up to BAND elements away; a write
to a tensor that is only read; and a read beside a tensor, because the rest is NaN and a NaN reaches the result. An
output that an op allocates itself comes out of such a buffer too: `fresh` puts its own torch.empty, empty_like,
empty_strided, Tensor.new_empty and new_empty_strided in the place of torch's, with the strides that were asked for.
running.py asserts that the outputs of kernels lie there, so none can be allocated unseen.

What it cannot see: a write further away than BAND elements (compute-sanitizer does, with `banded(False)`), a write of
the bits that were there already, a read whose value is thrown away, and what torch allocates for itself.
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

#: Where norm_plugin holds one of these functions, so that torch's name for it does not matter.
HELD = (rms.new_output,)

_empty = torch.empty
_band = BAND


@contextmanager
def banded(bands: bool) -> Iterator[None]:
    """With False, buffers end where their tensors end, so that a memory checker sees what leaves them."""
    global _band
    before, _band = _band, BAND if bands else 0
    try:
        yield
    finally:
        _band = before


@lru_cache(maxsize=512)
def pattern(size: int, itemsize: int, device: torch.device) -> Tensor:
    """What a buffer is filled with: in fp16, bf16 and fp32 NaNs, each with other bits than its neighbours."""
    at = torch.arange(size)
    if itemsize == 1:
        filled = 160 + at % 31
    else:
        filled = (0xFF81 + at % 113 << 8 * itemsize - 16) + (at % 251 if itemsize > 2 else 0)
        filled = filled - (1 << 8 * itemsize) if itemsize < 8 else filled
    return filled.to(BITS[itemsize]).to(device)


def extent(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """From the first element of a tensor to the one after its last."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


@lru_cache(maxsize=512)
def places(shape: tuple[int, ...], strides: tuple[int, ...], device: torch.device) -> Tensor:
    """Where in memory the elements lie, each place once."""
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
        """A tensor in it, `offset` elements after the first band; no view in the sense of autograd."""
        self.inside[name] = self.band + offset + places(shape, strides, self.raw.device)
        made = _empty(0, dtype=self.dtype, device=self.raw.device)
        return made.set_(self.raw.untyped_storage(), self.band + offset, shape, strides)

    def fill(self, name: str, values: Tensor) -> None:
        """One value for each place of a tensor."""
        self.raw[self.inside[name]] = values.to(self.dtype).to(self.raw.device).view(self.raw.dtype)

    def seal(self) -> None:
        """From here on, changes count."""
        self.before = self.raw.clone()

    def check(self, *written: str) -> None:
        """Assert that nothing changed but the tensors that are written."""
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
    """The buffers of what an op allocated."""

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []

    def carved(self, asked: Tensor) -> Tensor:
        """A tensor like the one that torch made, out of a buffer."""
        if type(asked) is not Tensor or asked.device.type == "meta" or asked.numel() == 0:
            return asked
        shape, strides = tuple(asked.shape), tuple(asked.stride())
        buffer = Buffer(extent(shape, strides), asked.dtype, asked.device)
        made = buffer.tensor("an output", shape, strides)
        buffer.seal()
        self.buffers.append(buffer)
        return made

    def guards(self, t: Tensor) -> bool:
        """Whether a tensor lies in one of the buffers, or has no elements; without bands, none is looked for."""
        return (
            not _band
            or t.numel() == 0
            or any(t.untyped_storage().data_ptr() == b.raw.untyped_storage().data_ptr() for b in self.buffers)
        )

    def check(self) -> None:
        """Assert that nothing was written beside what was allocated."""
        for buffer in self.buffers:
            buffer.check("an output")


_making: Fresh | None = None


def _replaced(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """One of torch's functions, with its tensors out of buffers while there is a Fresh. A launch that is bound then
    keeps this function, so it must stay right for ever."""

    def made(*args: Any, **named: Any) -> Tensor:
        asked = function(*args, **named)
        return asked if _making is None else _making.carved(asked)

    return made


_FUNCTIONS = {name: _replaced(getattr(torch, name)) for name in ("empty", "empty_like", "empty_strided")}
_METHODS = {name: _replaced(getattr(torch.Tensor, name)) for name in ("new_empty", "new_empty_strided")}


@contextmanager
def fresh() -> Iterator[Fresh]:
    """Have every allocation of a block of code lie between bands. Launches must be bound inside of such a block."""
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
