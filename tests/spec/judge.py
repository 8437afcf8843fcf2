"""Judges whether the outputs of a call are right: within half an ulp plus a derived bound of the fp64 oracle."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from norm_plugin.accuracy import bounds, oracle, ulps
from norm_plugin.accuracy.compared import allowed, row_errors
from norm_plugin.native.rms import wide_dtype
from norm_plugin.op import Op

Arguments = dict[str, Any]


class Truth(NamedTuple):
    """The right values of one output, and their bound. There are several if a numerics rounds in the middle."""

    oracles: list[Tensor]
    bound: Tensor


def check(op: Op, a: Arguments, outputs: tuple[Tensor, ...]) -> None:
    """Asserts that `outputs`, in the order of samples.outputs, are right for the arguments before the call."""
    truths = truths_of(op, a, outputs)
    assert len(outputs) == len(truths)
    for place, (output, truth) in enumerate(zip(outputs, truths, strict=True)):
        assert output.dtype == dtype_of(op, a, place)
        excess = ulps.excess(output, truth.bound + by_way_of_fp32(a, output, truth), *truth.oracles)
        worst = ulps.measure(output, *truth.oracles)
        assert excess == 0, f"output {place} is {excess} ulps beyond its bound; {worst}"


def truths_of(op: Op, a: Arguments, outputs: tuple[Tensor, ...]) -> list[Truth]:
    """The truth of each output, by the line of the op in TRUTHS, or by that of its kind."""
    return list((TRUTHS.get(op.name) or TRUTHS[op.kind])(op.name, a, outputs))


def by_way_of_fp32(a: Arguments, output: Tensor, truth: Truth) -> Tensor:
    """The cost of a second rounding: torch casts fp64 to a dtype below fp32 by way of fp32."""
    wide = any(isinstance(value, Tensor) and value.dtype == torch.float64 for value in a.values())
    narrow = output.dtype.is_floating_point and output.dtype.itemsize < 4
    return truth.oracles[0].abs() * (bounds.rounding(torch.float32) if wide and narrow else 0.0)


def dtype_of(op: Op, a: Arguments, place: int) -> torch.dtype:
    """The dtype that an output must have."""
    x = a[op.arguments[op.x]].dtype
    residual = [a["residual"].dtype] if a.get("residual") is not None else []
    by_op = {
        "rms": [a.get("output_dtype") or x, *residual],
        "layer": [a["linear_weight"].dtype if "linear_weight" in a else x],
        "gated": [x],
        "split": [wide_dtype(x) if op.name == "split_sums" else x],
        "quant": [a["out"].dtype, *residual] if "out" in a else [a.get("quant_dtype"), wide_dtype(x), *residual],
    }
    return by_op[op.kind][place]


def rms(name: str, a: Arguments, outputs: tuple[Tensor, ...]) -> Iterator[Truth]:
    how = (a["eps"], a["numerics"], a["gemma"], a["variance_size"])
    residual = a.get("residual")
    bound = bounds.rmsnorm(a["input"], a["weight"], residual, a["eps"], a["gemma"], a["variance_size"])
    if residual is None:
        yield Truth([oracle.rmsnorm(a["input"], a["weight"], *how, nudge) for nudge in oracle.NUDGES], bound)
    else:
        yield Truth([oracle.add_rmsnorm(a["input"], residual, a["weight"], *how, n)[0] for n in oracle.NUDGES], bound)
        yield added(a)


def l2norm(name: str, a: Arguments, outputs: tuple[Tensor, ...]) -> Iterator[Truth]:
    yield Truth([oracle.l2norm(a["input"], a["eps"])], bounds.l2norm(a["input"], a["eps"]))


def added(a: Arguments) -> Truth:
    """x + residual: one sum in fp32, with one rounding."""
    total = a["input"].double() + a["residual"].double()
    return Truth([total], bounds.rounding(a["input"].dtype) * total.abs())


def layer(name: str, a: Arguments, outputs: tuple[Tensor, ...]) -> Iterator[Truth]:
    of = getattr(oracle, name), getattr(bounds, name)
    given = [value for key, value in a.items() if key != "numerics"]  # all numerics round in one place
    yield Truth([of[0](*given)], of[1](*given))


def gated(name: str, a: Arguments, outputs: tuple[Tensor, ...]) -> Iterator[Truth]:
    yield Truth([oracle.gated_norm(*a.values())], bounds.gated_norm(*a.values()))


def split(name: str, a: Arguments, outputs: tuple[Tensor, ...]) -> Iterator[Truth]:
    given = a.values() if name == "split_rmsnorm" else (a["x"], a["z"])  # no numerics rounds before the sum
    yield Truth([getattr(oracle, name)(*given)], getattr(bounds, name)(*given))


def quant(name: str, a: Arguments, outputs: tuple[Tensor, ...]) -> Iterator[Truth]:
    """Judges a scale by itself, and the quantised row by the scale that was written for it."""
    x, residual = a["input"], a.get("residual")
    if name == "layernorm_quant":
        layer = (x, a["weight"], a["bias"], a["eps"], a["numerics"])
        norms, bound = [oracle.layernorm_to_quantise(*layer)], bounds.layernorm_to_quantise(*layer)
    else:
        how = (a["weight"], residual, a["eps"], a["numerics"], a["gemma"])
        norms = [oracle.to_quantise(x, *how, nudge) for nudge in oracle.NUDGES]
        bound = bounds.rmsnorm(x, a["weight"], residual, a["eps"], a["gemma"])
    if "out" in a:
        yield quantised(norms, bound, a["scale"].double(), a["out"].dtype)
    else:
        group, dtype = a.get("group_size") or x.shape[-1], a["quant_dtype"]
        norms = [norm.unflatten(-1, (-1, group)) for norm in norms]
        bound = bound.unflatten(-1, (-1, group))
        scale = outputs[1].double().unsqueeze(-1)
        truth = quantised(norms, bound, scale, dtype)
        yield Truth([o.flatten(-2) for o in truth.oracles], truth.bound.flatten(-2))
        scales = [oracle.dynamic_scale(norm, dtype, a.get("scale_ub"))[..., 0] for norm in norms]
        yield Truth(scales, bounds.product(scales[0], x.dtype))
    if residual is not None:
        yield added(a)


def quantised(norms: list[Tensor], bound: Tensor, scale: Tensor, dtype: torch.dtype) -> Truth:
    """norm / scale. Its bound is that of the norm over the scale, plus the roundings of the quotient."""
    quotients = [oracle.quantised(norm, scale, dtype) for norm in norms]
    return Truth(quotients, bound / scale + bounds.product(quotients[0], torch.float32))


TRUTHS = {
    "rms": rms,
    "l2norm": l2norm,
    "layer": layer,
    "gated": gated,
    "split": split,
    "quant": quant,
}


# --- against what is replaced -------------------------------------------------------------------------------------


def no_worse(ours: Tensor, theirs: Tensor, truth: Tensor) -> None:
    """Asserts that our error is not above theirs, on the same input with the same oracle."""
    for what, mine, other in zip(("mean", "max"), row_errors(ours, truth), row_errors(theirs, truth), strict=True):
        limit = allowed(mine - other, ours.dtype)
        assert (mine - other).mean() <= limit, (
            f"{what} error {mine.mean():.4f} ulps, theirs {other.mean():.4f}; by chance {limit:.4f}"
        )
