"""A call on its kernel: that it ran there, that both of its launches give the same bits, and that it agrees with its
native twin as far as another order of the sum explains.

TRITON is the backend of the tests here, and of those of tests/spec that take one: the case is the same as for the
native ops, and so is the judge with its bounds.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from norm_plugin import dispatch, settings
from norm_plugin.accuracy import ulps
from norm_plugin.op import Op
from tests.kernels.device import COMPILED, DEVICE
from tests.spec import judge, samples
from tests.spec.backend import Backend

Outputs = tuple[Tensor, ...]

MOST_KEPT = 2**31  # bytes of GPU memory between tests: other processes test beside this one

#: What a kernel reads row by row or column by column.
READ = ("input", "x", "residual", "z", "weight", "bias")


def refusal(op: Op, a: samples.Arguments) -> str:
    """Why the kernels must refuse a call, as the beginning of the reason, or ''. See test_refusals."""
    if a.get("variance_size") is not None:
        return "the variance is of the first"
    read = [a[name] for name in READ if a.get(name) is not None]
    if any(t.dtype == torch.float64 for t in read) or a.get("output_dtype") == torch.float64:
        return "the kernels compute in fp32"
    if any(t.shape[-1] > 1 and t.stride(-1) != 1 for t in read):
        return "the last stride is"
    if op.name == "rmsnorm_block_quant" and a["group_size"] & (a["group_size"] - 1):
        return "blocks of"
    return ""


def call(op: Op, a: samples.Arguments, *, through_torch: bool = False) -> Any:
    """The op, once: on its kernel, or refused for the right reason and native."""
    reason = refusal(op, a)
    backend = "native" if reason else "triton"
    lenient: AbstractContextManager[Any] = settings.override(strict=False) if reason else nullcontext()
    with lenient:
        before = dispatch.calls(op.name, backend)
        returned = samples.call(op, a, through_torch=through_torch)
        assert dispatch.calls(op.name, backend) == before + 1, f"{op.name} did not run on {backend}"
        if reason:
            route = [route for route in dispatch.routes() if route.op is op][-1]
            assert route.reason.startswith(reason), route.reason
    return returned


def uncompared(op: Op, a: samples.Arguments, *, through_torch: bool = False) -> Outputs:
    """What is returned, then what is written, on copies of what is written."""
    return samples.outputs(op, a, through_torch=through_torch, call=call)


def outputs(op: Op, a: samples.Arguments, *, through_torch: bool = False) -> Outputs:
    """The same, after it was compared with a second launch and with the native twin."""
    found = uncompared(op, a, through_torch=through_torch)
    if not refusal(op, a):
        if COMPILED:  # the first launch of a signature goes through Triton, later ones straight to the driver
            again = uncompared(op, a, through_torch=through_torch)
            assert all(same_bits(one, other) for one, other in zip(found, again, strict=True))
        agree(op, a, found, native(op, a))
    return found


TRITON = Backend(DEVICE, call, outputs)


@contextmanager
def on_kernels() -> Iterator[None]:
    """The block's calls run on the kernels, strictly: what falls back to native raises."""
    with settings.override(backend="triton", strict=True, compile=False, pdl=None), np.errstate(all="ignore"):
        yield
    dispatch.reset()
    if COMPILED and torch.cuda.memory_reserved() > MOST_KEPT:
        torch.cuda.empty_cache()


def native(op: Op, a: samples.Arguments) -> Outputs:
    """The outputs of the native twin."""
    return samples.outputs(op, a, call=lambda op, a, through_torch: op.native(*a.values()))


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Equal, NaN where the other is NaN, and a zero of the same sign."""
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32}[one.itemsize]
    nan, other_nan = (t.float().isnan() for t in (one, other))
    return torch.equal(nan, other_nan) and bool((nan | (one.view(bits) == other.view(bits))).all())


def apart(op: Op, a: samples.Arguments, ours: Outputs, theirs: Outputs) -> list[Outputs]:
    """For each output (how far both are apart, how far the arithmetic of both explains, an ulp), element by element.

    Each is its own truth, off by no more than its bound, and then rounded. What they are rounded from differs by both
    bounds, by as much as their truths differ (a row is quantised by the scale that was written for it), and by the
    rounding in the middle of a numerics, which may fall to either side.
    """
    found = []
    truths = (judge.truths_of(op, a, outputs) for outputs in (ours, theirs))
    for mine, other, own, others in zip(ours, theirs, *truths, strict=True):
        explained = own.bound + others.bound + (own.oracles[0] - others.oracles[0]).abs()
        for truth in (own, others):
            explained = explained + torch.stack([(o - truth.oracles[0]).abs() for o in truth.oracles]).amax(0)
        largest = torch.maximum(mine.double().abs(), other.double().abs())
        one_ulp = ulps.size(largest.where(largest.isfinite(), 0), mine.dtype)
        difference = (mine.double() - other.double()).abs()
        both_infinite = (mine.double() == other.double()) | (mine.double().isnan() & other.double().isnan())
        difference = difference.where(~both_infinite, 0.0)
        undefined = own.oracles[0].isnan() if mine.dtype == torch.int8 else torch.zeros_like(both_infinite)
        found.append((difference.where(~undefined, 0.0), explained.nan_to_num(0.0, posinf=0.0), one_ulp))
    return found


def agree(op: Op, a: samples.Arguments, ours: Outputs, theirs: Outputs) -> None:
    """Assert that kernel and native twin are no further apart than two roundings of what is explained: one ulp more.

    A residual has no sum over a row in it, so its bits are the same.
    """
    if a.get("residual") is not None:
        assert same_bits(ours[-1], theirs[-1]), "the residual is not b(x + r)"
    for place, (difference, explained, one_ulp) in enumerate(apart(op, a, ours, theirs)):
        assert ours[place].stride() == theirs[place].stride()
        assert ours[place].dtype == theirs[place].dtype
        excess = ((difference - explained) / one_ulp - 1).nan_to_num(torch.inf)
        worst = float(excess.max()) if excess.numel() else 0.0
        assert worst <= 0, f"output {place} is {worst} ulps further from its native twin than the arithmetic explains"


def seldom_apart(op: Op, a: samples.Arguments, ours: Outputs, theirs: Outputs) -> None:
    """Assert that they differ only where a tie lies between what both are rounded from.

    Of values without pattern, a share of `explained / ulp` has one there. Four times as many and sixteen more are let
    pass, since values repeat; a rounding too many or too few moves every second one.
    """
    for place, (difference, explained, one_ulp) in enumerate(apart(op, a, ours, theirs)):
        expected = float((explained / one_ulp).clamp(max=1).sum())
        count = int((difference != 0).sum())
        assert count <= 4 * expected + 16, f"output {place} differs from its native twin in {count} elements"
