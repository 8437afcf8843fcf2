"""Makes a launch from the tensors of a first call: what is refused, where the rows lie, and which tile holds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from norm_plugin.kernels import Refusal
from norm_plugin.kernels.configs import UNROLL, config
from norm_plugin.kernels.constants import Tile
from norm_plugin.kernels.launch import NOTHING, Launch, gpu_of, use_pdl
from norm_plugin.numerics import DESCRIPTION, Numerics

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Layout:
    """Where the rows of several tensors lie: sizes of the inner leading dimensions, and strides of each tensor."""

    levels: int
    sizes: tuple[int | None, int | None]
    strides: tuple[tuple[int | None, int | None, int | None], ...]
    align: int

    @property
    def integers(self) -> tuple[int | None, ...]:
        """The integers that a kernel gets."""
        return (*self.sizes, *(stride for strides in self.strides for stride in strides))


def layout(tensors: Sequence[Tensor | None]) -> Layout | None:
    """The layout of tensors of one shape, with as few levels as their strides allow; None if that is more than three.

    The size of the first dimension has no effect, so a batch of one row has the layout of any batch.
    """
    present = [t for t in tensors if t is not None]
    shape = list(present[0].shape[:-1]) or [1]
    strides = [list(t.stride()[:-1]) or [0] for t in present]
    dim = 1
    while dim < len(shape):
        if shape[dim] == 1 or all(s[dim - 1] == s[dim] * shape[dim] for s in strides):
            for s in strides:
                del s[dim - 1 if shape[dim] != 1 else dim]
            shape[dim - 1] *= shape[dim]
            del shape[dim]
        else:
            dim += 1
    if len(shape) > 3:
        return None
    levels = len(shape)
    sizes = (shape[1] if levels > 1 else None, shape[2] if levels > 2 else None)
    found = iter(strides)
    padded = tuple(tuple([*next(found), None, None][:3]) if t is not None else (None, None, None) for t in tensors)
    every = [stride for s in strides for stride in s]
    align = next(n for n in (16, 8, 1) if all(stride % n == 0 for stride in every))
    return Layout(levels, sizes, padded, align)  # type: ignore[arg-type]


def refuse_strange(*tensors: Tensor | None) -> None:
    """Refuses tensors that no kernel here can read."""
    for t in tensors:
        if t is None:
            continue
        if t.dtype not in DTYPES:
            raise Refusal(f"the kernels compute in fp32 and take fp16, bf16 and fp32, not {t.dtype}")
        if t.shape[-1] > 1 and t.stride(-1) != 1:
            raise Refusal(f"the last stride is {t.stride(-1)}, and the kernels read rows of stride 1")


def roundings(recipe: Any, numerics: Numerics, unread: str = "") -> dict[str, bool]:
    """The fields of a numerics that a kernel's recipe has too. Raises Refusal where another one is set, or `unread`,
    which this use of the kernel ignores."""
    every = {one.name: getattr(numerics, one.name) for one in fields(numerics) if one.name not in DESCRIPTION}
    for name, value in every.items():
        if value and (name == unread or name not in recipe._fields):
            raise Refusal(f"the kernel cannot do what {name} says of numerics {numerics.name!r}")
    return {name: value for name, value in every.items() if name in recipe._fields}


def layout_or_refuse(*tensors: Tensor | None) -> Layout:
    """The layout, or a Refusal."""
    found = layout(tensors)
    if found is None:
        raise Refusal("the rows do not lie on a grid of at most three strides")
    return found


def bind_rows(
    kernel: Any, table: str, recipe: Any, rows: Sequence[Tensor | None], columns: Sequence[Tensor | None], *,
    width: int | None = None, pdl: bool | None = None, in_place: Mapping[int, int] = NOTHING,
) -> Launch:  # fmt: skip
    """The launch of a kernel for the signature of these tensors, or a Refusal.

    `rows` lie row by row, x first and the output last; `columns` have a number for each column.
    """
    x = rows[0]
    assert x is not None
    refuse_strange(*rows[:-1], *columns)
    width = x.shape[-1] if width is None else width
    made, laid = config(table, width, x.element_size(), gpu_of(x.device)), layout_or_refuse(*rows)
    tile = Tile(
        n=width, block=made.block, chunks=made.chunks, unroll=UNROLL, held=made.held, with_row=made.with_row,
        rows=made.rows, levels=laid.levels, align=laid.align, pdl=use_pdl(pdl, x.device), late=made.late,
    )  # fmt: skip
    return Launch(kernel, made, laid.integers, x.device, tile, recipe, in_place)
