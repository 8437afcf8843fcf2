"""Places the tensors of a step in guarded buffers, and says whether their memory makes the call one to refuse."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from norm_plugin.accuracy import inputs
from tests.kernels.device import DEVICE
from tests.sequences.calls import (
    APART,
    FEATURES,
    FUNCTIONS,
    INTO_PARAMETERS,
    OVERLAPPING,
    SAME,
    SIDE_BY_SIDE,
    Arguments,
    Function,
    Step,
    _dense,
)
from tests.sequences.guards import Buffer, extent

SEEDS = {"input": 1, "x": 1, "residual": 2, "z": 3, "weight": 4, "bias": 5, "linear_weight": 6, "linear_bias": 7}


@dataclass
class Placed:
    """A call, ready to be made."""

    step: Step
    f: Function
    a: Arguments
    buffers: list[Buffer] = field(default_factory=list)
    before: Arguments = field(default_factory=dict)

    @property
    def written(self) -> tuple[str, ...]:
        return tuple(name for name in self.f.written if self.a[name] is not None)

    def seal(self) -> None:
        """Remembers all values and bits as they are now."""
        for buffer in self.buffers:
            buffer.seal()
        with torch.no_grad():
            self.before = {
                name: value.detach().clone(memory_format=torch.contiguous_format)
                if isinstance(value, Tensor)
                else value
                for name, value in self.a.items()
            }

    def buffer_of(self, name: str) -> Buffer:
        return next(buffer for buffer in self.buffers if name in buffer.inside)

    def shared(self) -> tuple[set[str], set[str]]:
        """(arguments whose shared elements must be refused, arguments for which refusal and result are both right)."""
        refused: set[str] = set()
        either: set[str] = set()
        for name in self.written:
            buffer = self.buffer_of(name)
            own = torch.zeros(len(buffer.raw), dtype=torch.bool, device=buffer.raw.device)
            own[buffer.inside[name]] = True
            if len(buffer.inside[name]) < self.a[name].numel():
                refused.add(name)
            for other, places in buffer.inside.items():
                if other == name or not bool(own[places].any()):
                    continue
                if self.step.relation != SAME or other in self.written:
                    refused |= {name, other}
                elif {name, other} != {"input", "out"}:
                    either |= {name, other}
        return refused, either - refused


def _kept(value: Any) -> Any:
    return value.detach().clone(memory_format=torch.contiguous_format) if isinstance(value, Tensor) else value


def completed(step: Step) -> Step:
    """Adjusts the choices: tensors that share memory share a dtype, and a quantised norm has no gradient."""
    f = FUNCTIONS[step.function]
    if step.relation != APART:
        step = replace(step, residual_dtype=step.dtype, weight_dtype=step.dtype, absent=step.absent - {"residual"})
    if step.relation == INTO_PARAMETERS:
        step = replace(step, absent=step.absent - {"weight"})
    if step.mode == "leaf" and not f.written:
        step = replace(step, mode="plain")
    if step.mode == "backward" and not f.differentiable:
        step = replace(step, mode="no_grad")
    return step


def place(step: Step) -> Placed:
    """Makes the tensors of a step."""
    f = FUNCTIONS[step.function]
    a = dict(zip(f.op.arguments, f.op.defaults, strict=True)) | dict(step.plain)
    placed = Placed(step, f, a)
    with torch.inference_mode(step.mode == "inference tensors"), torch.no_grad():
        _rows(placed)
        _parameters(placed)
    for name in step.absent:
        if name in a:
            a[name] = None
    placed.buffers = [b for b in placed.buffers if any(a.get(name) is not None for name in b.inside)]
    return placed


def _rows(placed: Placed) -> None:
    """Makes x and the other tensors of rows."""
    step, f, a = placed.step, placed.f, placed.a
    dtypes = {"residual": step.residual_dtype, "out": step.out_dtype}
    pair = f.pair if step.relation in (SIDE_BY_SIDE, SAME, OVERLAPPING) else None
    if pair is not None:
        _together(placed, pair)
    for place, name in enumerate(f.by_row):
        if pair is not None and name in pair:
            continue
        layout = step.layouts[2 if name in f.written else min(place, 1)]
        strides = step.strides(layout)
        offset = step.offset if place == 0 else step.offset * (place % 2)
        buffer = Buffer(offset + extent(step.shape, strides), dtypes.get(name, step.dtype), DEVICE)
        a[name] = buffer.tensor(name, step.shape, strides, offset)
        _fill(placed, buffer, name)
        if step.relation == INTO_PARAMETERS and name in f.written[-1:]:
            a["weight"] = buffer.tensor("weight", (step.width,), (1,), offset) if a[name].numel() else None
            a["weight"] = None if a["weight"] is None or a["weight"].dtype != step.dtype else a["weight"]
        placed.buffers.append(buffer)


def _together(placed: Placed, pair: tuple[str, str]) -> None:
    """Makes two tensors in one buffer."""
    step, a = placed.step, placed.a
    written = pair[0] in placed.f.written or pair[1] in placed.f.written
    strides, shift = step.strides(step.layouts[2 if written else 0]), 0
    if step.relation == SIDE_BY_SIDE:
        strides, shift = (*_dense(step.inner, 2 * step.width + 8), 1), step.width
        strides = strides if step.rows is not None else strides[-1:]
    elif step.relation == OVERLAPPING:
        shift = strides[0] if step.shift < 0 else step.shift
    buffer = Buffer(step.offset + shift + extent(step.shape, strides), step.dtype, DEVICE)
    for place, name in enumerate(pair):
        a[name] = buffer.tensor(name, step.shape, strides, step.offset + place * shift)
        _fill(placed, buffer, name)
    placed.buffers.append(buffer)


def _parameters(placed: Placed) -> None:
    """Makes weights, biases and scales."""
    step, a = placed.step, placed.a
    shapes = {
        "weight": (step.width,),
        "bias": (step.width,),
        "linear_weight": (FEATURES, step.width),
        "linear_bias": (FEATURES,),
    }
    for name in placed.f.op.arguments:
        if name in shapes and a[name] is None:
            shape = shapes[name]
            buffer = Buffer(step.offset + extent(shape, _contiguous(shape)), step.weight_dtype, DEVICE)
            a[name] = buffer.tensor(name, shape, _contiguous(shape), step.offset)
            _fill(placed, buffer, name)
            placed.buffers.append(buffer)
        elif name in ("scale", "scale_ub"):
            buffer = Buffer(1, torch.float32, DEVICE)
            a[name] = buffer.tensor(name, (), ())
            buffer.fill(name, torch.tensor([0.02 if name == "scale" else 1.5]))
            placed.buffers.append(buffer)


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


def _fill(placed: Placed, buffer: Buffer, name: str) -> None:
    count = len(buffer.inside[name])
    if name == "out":
        return
    values = inputs.randn([count], SEEDS[name] + 10 * placed.step.seed)
    buffer.fill(name, 1 + values / 4 if name == "weight" else values / 4 if "bias" in name else values)
