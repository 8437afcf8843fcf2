"""How far a gradient may be from autograd through the oracle in fp64: half an ulp, plus the errors of its terms.

A gradient is a sum of terms. Each term is a product of values that had at most ROUNDINGS roundings in fp32: the scale
of a row, its normalized value, the mean over the row, and the product itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from norm_plugin.accuracy import bounds, oracle, ulps
from tests.sequences.calls import Arguments

FACTORS = 4

TRUTHS: dict[str, Callable[[Arguments], Tensor | tuple[Tensor, Tensor]]] = {
    "rmsnorm": lambda a: oracle.rmsnorm(a["input"], a["weight"], a["eps"], "fp32", a["gemma"], a["variance_size"]),
    "add_rmsnorm": lambda a: oracle.add_rmsnorm(
        a["input"], a["residual"], a["weight"], a["eps"], "fp32", a["gemma"], a["variance_size"]
    ),
    "l2norm": lambda a: oracle.l2norm(a["input"], a["eps"]),
    "layernorm": lambda a: oracle.layernorm(a["input"], a["weight"], a["bias"], a["eps"]),
    "layernorm_linear": lambda a: (
        oracle.layernorm(a["x"], a["weight"], a["bias"], a["eps"]) @ a["linear_weight"].double().t()
        + oracle.offset(a["linear_bias"])
    ),
    "gated_norm": lambda a: oracle.gated_norm(*(a | {"numerics": "fp32"}).values()),
}
NAMES = {"rmsnorm_out": "rmsnorm", "fused_add_rmsnorm": "add_rmsnorm"}


def right(op: str, a: Arguments, found: dict[str, Tensor], grads: list[Tensor | None]) -> None:
    """Asserts that the gradients `found` of the arguments are right for these gradients of the outputs."""
    name = NAMES.get(op, op)
    if name == "add_rmsnorm":  # the gradient is taken at the sum that is written, rounded
        total = (a["input"].double() + a["residual"].double()).to(a["residual"].dtype)
        a = a | {"input": total.double(), "residual": torch.zeros_like(total)}
    tensors = {key: a[key].detach().double().requires_grad_() for key in found}
    outs = TRUTHS[name](a | tensors)
    pairs = zip(outs if isinstance(outs, tuple) else (outs,), grads, strict=True)
    given = [(o, g.double()) for o, g in pairs if g is not None]
    of, wide = map(list, zip(*given, strict=True))
    true = torch.autograd.grad(of, list(tensors.values()), wide, allow_unused=True)
    allowed = dict(amounts(name, a, grads))
    for (key, mine), truth in zip(found.items(), true, strict=True):
        truth = torch.zeros_like(tensors[key]) if truth is None else truth
        limit = allowed[key]
        if name == "add_rmsnorm":  # of the sum, and then of what was added
            limit = limit + truth.abs() * torch.finfo(a["residual"].dtype).eps / 2
        excess = ulps.excess(mine, limit.expand(truth.shape), truth)
        assert excess == 0, f"the gradient of {key} is {excess} ulps beyond its bound; {ulps.measure(mine, truth)}"


def amounts(name: str, a: Arguments, grads: list[Tensor | None]) -> Iterator[tuple[str, Tensor]]:
    """(argument, the bound of its gradient) for each argument with a gradient."""
    unit = FACTORS * bounds.ROUNDINGS * bounds.rounding(torch.float32)
    if grads[0] is None:
        beside = grads[1]
        assert beside is not None
        yield from ((key, 0 * beside.double()) for key in ("input", "residual"))
        yield "weight", torch.zeros(())
        return
    g = grads[0].double().abs()
    if name in ("rmsnorm", "add_rmsnorm", "l2norm"):
        yield from rms(name, a, g, grads, unit)
    elif name == "layernorm_linear":
        yield from linear(a, grads[0].double(), unit)
    else:
        yield from gated(a, g, unit)


def rms(name: str, a: Arguments, g: Tensor, grads: list[Tensor | None], unit: float) -> Iterator[tuple[str, Tensor]]:
    h, columns = a["input"].double(), a.get("variance_size") or a["input"].shape[-1]
    if name == "l2norm":
        s, gw, divisor = 1 / (h.square().sum(-1, keepdim=True) + a["eps"]).sqrt(), g, 1
    else:
        s, divisor = oracle.inverse_root(h, a["eps"], a["variance_size"]), columns
        gw = g * bounds.magnitude(oracle.factor(a["weight"], a["gemma"]))
    y = (h * s).abs()
    terms = s * (gw + y * (gw * y).sum(-1, keepdim=True) / divisor)
    if len(grads) > 1 and grads[1] is not None:
        terms = terms + grads[1].double().abs()
    yield "input", unit * terms
    yield "residual", unit * terms
    yield "weight", shared(g * y, unit)


def shared(terms: Tensor, unit: float) -> Tensor:
    """The bound of a sum over all rows: one rounding for each row."""
    rows = terms.flatten(0, -2) if terms.dim() > 1 else terms[None]
    return (unit + len(rows) * bounds.rounding(torch.float32)) * rows.sum(0)


def linear(a: Arguments, grad: Tensor, unit: float) -> Iterator[tuple[str, Tensor]]:
    """The bounds of two matrix products around the gradient of the norm. The first product is rounded before it."""
    matrix, narrow = a["linear_weight"].double(), torch.finfo(a["linear_weight"].dtype).eps
    into, magnitude = (grad @ matrix).abs(), grad.abs() @ matrix.abs()
    off = narrow * into + (matrix.shape[0] + 1) * bounds.rounding(torch.float32) * magnitude
    norm = {"z": None, "group_size": None, "is_rms_norm": False, "norm_before_gate": True, "activation": "silu"}
    exact, lost = dict(gated(a | norm, into, unit)), dict(gated(a | norm, off, 1.0))
    for key in ("x", "weight", "bias"):
        yield key, exact[key] + lost[key]
    normed = oracle.layernorm(a["x"], a["weight"], a["bias"], a["eps"])
    off = bounds.layernorm(a["x"], a["weight"], a["bias"], a["eps"])
    off = off + (torch.finfo(a["x"].dtype).eps + narrow) * normed.abs()
    rows, count = grad.abs().reshape(-1, grad.shape[-1]), grad.numel() // grad.shape[-1]
    terms = off + (unit + count * bounds.rounding(torch.float32)) * (normed.abs() + off)
    yield "linear_weight", rows.t() @ terms.reshape(-1, terms.shape[-1])
    yield "linear_bias", (narrow + count * bounds.rounding(torch.float32)) * rows.sum(0)


def gated(a: Arguments, g: Tensor, unit: float) -> Iterator[tuple[str, Tensor]]:
    x = a["x"] if "x" in a else a["input"]
    z, group, centred = a.get("z"), a.get("group_size") or x.shape[-1], not a.get("is_rms_norm", False)
    before, activation = a.get("norm_before_gate", True), a.get("activation", "silu")
    xhat, _, rstd = oracle.normalized_groups(x, z, a["eps"], group, before, not centred, activation)
    act = torch.ones_like(xhat) if z is None else oracle.gate(z, activation).abs()
    s = rstd.repeat_interleave(group, -1)
    h = x.double().abs() * (act if z is not None and not before else 1)
    y = xhat.abs() + centred * (1 + 2 * s * h.unflatten(-1, (-1, group)).amax(-1).repeat_interleave(group, -1))
    normed = g * (act if before else 1)
    weight, bias = (bounds.magnitude(oracle.factor(a["weight"])), bounds.magnitude(oracle.offset(a["bias"])))

    def mean(t: Tensor) -> Tensor:
        return t.unflatten(-1, (-1, group)).mean(-1).repeat_interleave(group, -1)

    gw = normed * weight
    dh = s * (gw + centred * mean(gw) + y * mean(gw * y))
    dx = dh if z is None or before else dh * act
    yield "x", unit * dx
    yield "input", unit * dx
    yield "weight", shared(normed * y, unit)
    yield "bias", shared(normed, unit)
    if z is not None:
        sigmoid = torch.sigmoid(z.double())
        slope = (
            sigmoid * (1 - sigmoid) if activation == "sigmoid" else sigmoid + z.double().abs() * sigmoid * (1 - sigmoid)
        )
        yield "z", unit * slope * (g * (y * weight + bias) if before else dh * x.double().abs())
