"""A launch is the same whichever call of its signature binds it.

A signature is the op, its plain arguments, and for each tensor its dtype, device, strides and all sizes but the number
of rows. So every number of rows must bind the same integers, constants and options, or be refused for the same reason.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck

from norm_plugin import kernels
from norm_plugin.gradients import BACKWARD_OPS
from norm_plugin.op import Op
from tests.kernels.device import DEVICE, INTERPRETED
from tests.sequences.calls import APART, READABLE, ROWS, Step, steps
from tests.sequences.guards import Buffer, extent
from tests.sequences.placing import completed, place

pytest.importorskip("triton")
from norm_plugin.kernels.launch import KernelLaunch

BATCHES = (1, 2, 7, 100, 4097, 10**6)

Description = tuple[Any, ...]


def described(launch: KernelLaunch) -> Description:
    """All that a launch passes except pointers, the number of rows and eps."""
    lean = None if launch.lean is None else described(launch.lean)
    grids = [launch.programs(m) for m in BATCHES]
    return launch.kernel, launch.integers, launch.constants, launch.options, grids, launch.lean_from, lean


def bound(op: Op, args: tuple[Any, ...]) -> list[Description] | str:
    """The launches that a first call with these arguments binds, or the reason of its refusal."""
    bind = kernels.find(op.kind, op.name)
    assert bind is not None
    try:
        found = bind(*args)
    except kernels.Refusal as refusal:
        return str(refusal)
    assert found.launches, f"{op.name} launches nothing"
    return [described(launch) for launch in found.launches]


def signature(op: Op, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Everything that a launch may depend on."""
    return tuple(
        (t.dtype, t.device, t.stride(), t.shape[1:] if op.by_row[i] and t.dim() > 1 else t.shape)
        if isinstance(t, torch.Tensor)
        else t
        for i, t in enumerate(args)
    )


def backward(step: Step, a: dict[str, Any], name: str) -> tuple[Any, ...]:
    """The arguments of a backward op, the incoming gradient in another layout."""
    op = BACKWARD_OPS[name]
    made = dict(zip(op.arguments, op.defaults, strict=True)) | {key: a[key] for key in op.arguments if key in a}
    for number, key in enumerate(("grad", "residual_grad")):
        if key in op.arguments:
            strides = step.strides(tuple(READABLE)[(step.seed + number) % len(READABLE)])
            made[key] = Buffer(extent(step.shape, strides), step.dtype, DEVICE).tensor(key, step.shape, strides)
    return tuple(made.values())


@pytest.mark.skipif(INTERPRETED, reason="nothing is launched here, so it is shown without the interpreter")
@hypothesis.settings(
    max_examples=250, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
@hypothesis.given(step=steps())
def test_every_first_call_binds_the_same(step: Step) -> None:
    of_signature: list[tuple[Any, ...]] = []
    of_backward: list[tuple[Any, ...]] = []
    for rows in ROWS:
        placed = place(completed(replace(step, rows=rows, mode="plain", relation=APART)))
        op, args = placed.f.op, tuple(placed.a.values())
        of_signature.append((signature(op, args), bound(op, args)))
        name = f"{op.name}_backward"
        if name in BACKWARD_OPS:
            args = backward(placed.step, placed.a, name)
            of_backward.append((signature(BACKWARD_OPS[name], args), bound(BACKWARD_OPS[name], args)))
    for found in (of_signature, of_backward):
        for rows, (key, launch) in zip(ROWS, found, strict=False):
            assert key == found[-1][0], "these calls have not one signature, so the test shows nothing"
            assert launch == found[-1][1], f"a first call with {rows} rows binds another launch than {ROWS[-1]} rows"
