"""Compares every op with its oracle on one device: a row for each case and dtype."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from norm_plugin import dispatch
from norm_plugin.accuracy import bounds, oracle, ulps
from norm_plugin.accuracy.cases import Case, Inputs, Outputs, cases

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

#: Input classes for which fp32 neither underflows nor overflows, so that one bound holds for all.
CLASSES = ("normal", "outliers", "row_scales", "large_mean", "zeros")


@dataclass(frozen=True)
class Row:
    """One case in one dtype, in ulps. `error` and `bound` are those of the element that comes nearest to its bound."""

    op: str
    variant: str
    numerics: str
    dtype: str
    backend: str
    reason: str
    inputs: str
    error: float
    mean: float
    bound: float
    passed: bool


def judged(
    actual: Sequence[Tensor], truths: Sequence[Outputs], off: Tensor | None, dtype: torch.dtype
) -> tuple[float, float, float]:
    """(error, mean error of the first output, bound) of a call in `dtype`.

    The bound is half an ulp for the rounding, plus the error of fp32. If a numerics rounds in the middle, there is more
    than one right value, and the nearest counts.
    """
    error, bound, means = 0.0, 0.5, []
    for place, result in enumerate(actual):
        truth = truths[0][place]
        arithmetic = bounds.product(truth, dtype) if off is None or place > 0 else off
        limits = 0.5 + arithmetic / ulps.size(truth, result.dtype)
        errors = ulps.nearest(result, *[outputs[place] for outputs in truths])
        worst = int((errors / limits).argmax())
        here, limit = float(errors.flatten()[worst]), float(limits.flatten()[worst])
        if here / limit >= error / bound:
            error, bound = here, limit
        means.append(float(errors.mean()))
    return error, means[0], bound


def row(case: Case, dtype: str, device: torch.device) -> Row:
    """One case in one dtype, on all input classes. The class that comes nearest to its bound makes the row."""
    results = []
    for name in CLASSES:
        inputs = Inputs.make(name, DTYPES[dtype])
        dispatch.reset()
        actual = case.call(inputs.to(device))
        route = dispatch.routes()[-1]
        truths = [case.oracle(inputs, nudge) for nudge in oracle.NUDGES]
        off = None if case.bound is None else case.bound(inputs)
        results.append((name, *judged([t.cpu() for t in actual], truths, off, DTYPES[dtype])))
    name, error, _, bound = max(results, key=lambda result: result[1] / result[3])
    mean = sum(result[2] for result in results) / len(results)
    what = (case.op, case.variant, case.numerics, dtype)
    return Row(*what, route.backend, route.reason, name, error, mean, bound, passed=error <= bound)


def rows(device: torch.device) -> Iterator[Row]:
    """Every case in every dtype."""
    for case in cases():
        for dtype in DTYPES:
            yield row(case, dtype, device)


def count() -> int:
    """The number of rows."""
    return len(cases()) * len(DTYPES)
