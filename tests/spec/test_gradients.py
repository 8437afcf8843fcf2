"""Gradients: gradcheck in fp64 of every differentiable op, with and without each optional argument; incoming gradients
with any strides; the functions that write, under autograd; and narrow dtypes against fp64.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck

import norm_plugin
from norm_plugin.accuracy import bounds, inputs, oracle, ulps
from norm_plugin.gradients import BACKWARD_OPS
from norm_plugin.numerics import ACTIVATIONS, GATED_NUMERICS, NUMERICS
from norm_plugin.ops import OPS
from tests.spec import judge, layouts, samples
from tests.spec.backend import Backend

ROWS, WIDTH = 3, 8
EPS = 1e-3  # gradcheck takes differences of 1e-6, at which rows must stay smooth even if eps decides their scale

DIFFERENTIABLE = ("rmsnorm", "add_rmsnorm", "l2norm", "layernorm", "layernorm_linear", "gated_norm")

GATED = [
    {"norm_before_gate": before, "is_rms_norm": rms, "group_size": group, "activation": activation}
    for before, rms, group, activation in product((True, False), (True, False), (None, 4), ACTIVATIONS)
]
RMS = [*({"numerics": name} for name in NUMERICS), {"gemma": True}, {"variance_size": 5}, {"weight": None}]
LAYER = [{}, {"weight": None}, {"bias": None}, {"weight": None, "bias": None}]
CASES: dict[str, list[samples.Arguments]] = {
    "rmsnorm": [*RMS, {"gemma": True, "variance_size": 5}, {"weight": None, "variance_size": 5}],
    "add_rmsnorm": [*RMS, {"gemma": True, "variance_size": 5}],
    "l2norm": [{}, {"output_dtype": torch.float64}],
    "layernorm": LAYER,
    "layernorm_linear": [*LAYER, {"linear_bias": None}],
    "gated_norm": [
        *GATED,
        *({"numerics": name} for name in GATED_NUMERICS),
        *(how | given for how in GATED[::6] for given in (*LAYER[1:], {"z": None})),
    ],
}
EVERY = [(name, variant) for name, variants in CASES.items() for variant in variants]
IDS = [samples.label(name, variant) for name, variant in EVERY]


def leaves(a: samples.Arguments) -> dict[str, Tensor]:
    """The tensors of a call that can have a gradient, which now require one."""
    return {
        name: a[name].detach().clone().requires_grad_()
        for name in a
        if isinstance(a[name], Tensor) and a[name].is_floating_point()
    }


def function_of(name: str, a: samples.Arguments) -> Callable[..., Tensor | tuple[Tensor, ...]]:
    """The op as a function of its tensors."""
    op, names = getattr(torch.ops.norm_plugin, name), list(leaves(a))
    return lambda *tensors: op(*(a | dict(zip(names, tensors, strict=True))).values())


def gradients(name: str, a: samples.Arguments, *grads: Tensor) -> dict[str, Tensor]:
    """The gradient of each tensor of a call, from gradients of its outputs."""
    tensors = leaves(a)
    out = function_of(name, a)(*tensors.values())
    found = torch.autograd.grad(out, list(tensors.values()), list(grads) if isinstance(out, tuple) else grads[0])
    return dict(zip(tensors, found, strict=True))


def test_the_cases_are_all_differentiable_ops() -> None:
    assert set(CASES) == set(DIFFERENTIABLE)
    every = [*OPS, *BACKWARD_OPS]
    with_formula = [n for n in every if torch._C._dispatch_has_kernel_for_dispatch_key(f"norm_plugin::{n}", "Autograd")]
    assert set(with_formula) == {*DIFFERENTIABLE, *BACKWARD_OPS}


@pytest.mark.parametrize(("name", "variant"), EVERY, ids=IDS)
def test_gradcheck(name: str, variant: samples.Arguments) -> None:
    a = samples.arguments(OPS[name], (ROWS, WIDTH), torch.float64, eps=EPS, **variant)
    assert gradcheck(function_of(name, a), tuple(leaves(a).values()))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradcheck_of_three_dimensions(name: str) -> None:
    a = samples.arguments(OPS[name], (2, 2, WIDTH), torch.float64, eps=EPS)
    assert gradcheck(function_of(name, a), tuple(leaves(a).values()))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_only_the_gradients_that_are_wanted_are_made(name: str) -> None:
    a = samples.arguments(OPS[name], (ROWS, WIDTH), torch.float32)
    names = list(leaves(a))
    for wanted in names:
        tensors = [a[other].detach().requires_grad_(other == wanted) for other in names]
        out = function_of(name, a)(*tensors)
        total = sum(o.sum() for o in out) if isinstance(out, tuple) else out.sum()
        total.backward()
        assert [t.grad is not None for t in tensors] == [other == wanted for other in names]


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_through_one_output_alone(name: str) -> None:
    """Then the other output of add_rmsnorm gets no gradient, which counts as zero."""
    a = samples.arguments(OPS[name], (ROWS, WIDTH), torch.float64, eps=EPS)
    tensors = leaves(a)
    outs = function_of(name, a)(*tensors.values())
    outs = outs if isinstance(outs, tuple) else (outs,)
    for place, out in enumerate(outs):
        grad = torch.ones_like(out)
        alone = torch.autograd.grad(out, list(tensors.values()), grad, retain_graph=True, allow_unused=True)
        zeros = [grad if other == place else torch.zeros_like(outs[other]) for other in range(len(outs))]
        both = torch.autograd.grad(outs, list(tensors.values()), zeros, retain_graph=True, allow_unused=True)
        for one, other in zip(alone, both, strict=True):
            torch.testing.assert_close(torch.zeros_like(other) if one is None else one, other)


# --- incoming gradients of any strides ----------------------------------------------------------------------------


def expanded(grad: Tensor) -> Tensor:
    """As from sum().backward(): one value, strides 0."""
    return grad.flatten()[0].expand(grad.shape)


def columns_first(grad: Tensor) -> Tensor:
    """As from a transpose."""
    return grad.transpose(0, -1).contiguous().transpose(0, -1)


def every_second(grad: Tensor) -> Tensor:
    """A last stride of 2."""
    return torch.stack([grad, grad], -1).flatten(-2)[..., ::2]


@pytest.mark.parametrize("strided", [expanded, columns_first, every_second, layouts.padded])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(5, 48), (3, 5, 48), (2, 3, 5, 48)], ids=str)
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_incoming_gradients_of_any_strides(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, strided: Callable[[Tensor], Tensor]
) -> None:
    """The same values give the same gradients, up to the order of a sum. The bound is that of the sum over rows or
    columns, 16 roundings in fp32 of the terms, plus one rounding of the dtype, if the two results lie on different
    sides of a tie. The largest gradient stands for the terms."""
    a = samples.arguments(OPS[name], shape, dtype)
    outs = function_of(name, a)(*leaves(a).values())
    outs = outs if isinstance(outs, tuple) else (outs,)
    grads = [strided(inputs.make("normal", out.shape, dtype, 7 + place)) for place, out in enumerate(outs)]
    assert not any(grad.is_contiguous() for grad in grads)
    ours, plain = gradients(name, a, *grads), gradients(name, a, *(grad.contiguous() for grad in grads))
    for tensor in ours:
        unit = bounds.ROUNDINGS * bounds.rounding(dtype) + (torch.finfo(dtype).eps if dtype != torch.float32 else 0)
        assert (ours[tensor] - plain[tensor]).abs().max() <= unit * plain[tensor].abs().max(), tensor


# --- the functions that write -------------------------------------------------------------------------------------


@pytest.mark.parametrize("gemma", [False, True], ids=["plain", "gemma"])
def test_the_fused_add_in_place_under_autograd(gemma: bool) -> None:
    function = norm_plugin.gemma_fused_add_rmsnorm if gemma else norm_plugin.fused_add_rmsnorm
    a = samples.arguments(OPS["add_rmsnorm"], (5, 48), torch.float64, gemma=gemma)
    tensors = leaves(a)
    input, residual = tensors["input"] * 1, tensors["residual"] * 1
    function(input, residual, tensors["weight"], a["eps"])
    grads = [inputs.make("normal", (5, 48), torch.float64, seed) for seed in (7, 8)]
    found = torch.autograd.grad((input, residual), list(tensors.values()), grads)
    for one, other in zip(found, gradients("add_rmsnorm", a, *grads).values(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("gemma", [False, True], ids=["plain", "gemma"])
@pytest.mark.parametrize("aliased", [False, True], ids=["out", "out_is_input"])
def test_out_under_autograd(gemma: bool, aliased: bool) -> None:
    function = norm_plugin.gemma_rmsnorm if gemma else norm_plugin.rmsnorm
    a = samples.arguments(OPS["rmsnorm"], (5, 48), torch.float64, gemma=gemma)
    tensors = leaves(a)
    x = tensors["input"] * 1
    out = x if aliased else torch.zeros_like(x)
    assert function(x, tensors["weight"], a["eps"], out=out) is out
    grad = inputs.make("normal", (5, 48), torch.float64, 7)
    found = torch.autograd.grad(out, list(tensors.values()), grad)
    for one, other in zip(found, gradients("rmsnorm", a, grad).values(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_fused_add_is_no_worse_than_adding_and_normalizing_in_torch(dtype: torch.dtype) -> None:
    """Against the gradient at the unrounded sum, which neither of them has kept."""
    rows, width = 256, 64
    a = samples.arguments(OPS["add_rmsnorm"], (rows, width), dtype)
    grads = [inputs.make("normal", (rows, width), dtype, seed) for seed in (7, 8)]
    ours, tensors = gradients("add_rmsnorm", a, *grads), leaves(a)
    h = tensors["input"] + tensors["residual"]
    plain = torch.autograd.grad(
        [F.rms_norm(h, (width,), tensors["weight"], a["eps"]), h], list(tensors.values()), grads
    )
    exact = {key: value.detach().double().requires_grad_() for key, value in leaves(a).items()}
    truth = torch.autograd.grad(TRUTHS["add_rmsnorm"](a | exact), list(exact.values()), [g.double() for g in grads])
    for place, key in enumerate(("input", "residual")):
        judge.no_worse(ours[key], plain[place], truth[place])


def test_values_under_autograd_are_those_without() -> None:
    for name in DIFFERENTIABLE:
        a = samples.arguments(OPS[name], (5, 48), torch.bfloat16)
        outs = function_of(name, a)(*leaves(a).values())
        outs = outs if isinstance(outs, tuple) else (outs,)
        assert all(torch.equal(*pair) for pair in zip(outs, samples.outputs(OPS[name], a), strict=True))


# --- narrow dtypes ------------------------------------------------------------------------------------------------

TRUTHS: dict[str, Callable[..., Tensor | tuple[Tensor, Tensor]]] = {
    "rmsnorm": lambda a: oracle.rmsnorm(a["input"], a["weight"], a["eps"], "fp32", a["gemma"], a["variance_size"]),
    "add_rmsnorm": lambda a: oracle.add_rmsnorm(
        a["input"], a["residual"], a["weight"], a["eps"], "fp32", a["gemma"], a["variance_size"]
    ),
    "l2norm": lambda a: oracle.l2norm(a["input"], a["eps"]),
    "layernorm": lambda a: oracle.layernorm(a["input"], a["weight"], a["bias"], a["eps"]),
    "gated_norm": lambda a: oracle.gated_norm(*a.values()),
}

NARROW = [
    ("rmsnorm", {}),
    ("rmsnorm", {"gemma": True}),
    ("rmsnorm", {"variance_size": 24}),
    ("add_rmsnorm", {}),
    ("l2norm", {}),
    ("layernorm", {}),
    *(("gated_norm", how) for how in GATED[::4]),
]


def at_the_sum(a: samples.Arguments) -> samples.Arguments:
    """The gradient of a fused add is taken at the rounded sum, because autograd keeps that."""
    if "residual" not in a:
        return a
    total = (a["input"].double() + a["residual"].double()).to(a["residual"].dtype)
    return a | {"input": total, "residual": torch.zeros_like(total)}


def true_gradients(name: str, a: samples.Arguments, *grads: Tensor) -> dict[str, Tensor]:
    """Autograd through the oracle, in fp64, on the same values."""
    a = at_the_sum(a)
    tensors = {key: value.detach().double().requires_grad_() for key, value in leaves(a).items()}
    out = TRUTHS[name](a | tensors)
    wide = [grad.double() for grad in grads]
    found = torch.autograd.grad(out, list(tensors.values()), wide if isinstance(out, tuple) else wide[0])
    return dict(zip(tensors, found, strict=True))


def fp32_gradients(name: str, a: samples.Arguments, *grads: Tensor) -> dict[str, Tensor]:
    """Autograd through the plain formula in fp32, each gradient rounded to the dtype of its tensor."""
    a = at_the_sum(a)
    tensors = {key: value.detach().float().requires_grad_() for key, value in leaves(a).items()}
    t = a | tensors
    x = t.get("input", t.get("x"))
    if name == "layernorm":
        outs = [F.layer_norm(x, x.shape[-1:], t["weight"], t["bias"], t["eps"])]
    elif name == "l2norm":
        outs = [x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + t["eps"])]
    elif name == "gated_norm":
        outs = [gated(t)]
    else:
        h = x + t["residual"] if "residual" in t else x
        y = h * torch.rsqrt(h[..., : t["variance_size"]].pow(2).mean(-1, keepdim=True) + t["eps"])
        weight = torch.ones(()) if t["weight"] is None else t["weight"]
        outs = [y * (1 + weight if t["gemma"] else weight), h]
    found = torch.autograd.grad(outs[: len(grads)], list(tensors.values()), [grad.float() for grad in grads])
    return {key: grad.to(a[key].dtype) for key, grad in zip(tensors, found, strict=True)}


def gated(t: samples.Arguments) -> Tensor:
    """The gated norm as mamba_ssm's reference writes it."""
    z = torch.full((), torch.inf) if t["z"] is None else t["z"]
    act = torch.sigmoid(z) if t["activation"] == "sigmoid" or t["z"] is None else F.silu(z)
    h = t["x"] if t["norm_before_gate"] else t["x"] * act
    groups = h.unflatten(-1, (-1, t["group_size"] or h.shape[-1]))
    if not t["is_rms_norm"]:
        groups = groups - groups.mean(-1, keepdim=True)
    normed = (groups * torch.rsqrt(groups.pow(2).mean(-1, keepdim=True) + t["eps"])).flatten(-2)
    y = normed if t["weight"] is None else normed * t["weight"]
    y = y if t["bias"] is None else y + t["bias"]
    return y * act if t["norm_before_gate"] else y


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("name", "variant"), NARROW, ids=[samples.label(*case) for case in NARROW])
def test_no_worse_than_autograd_of_the_formula(name: str, variant: samples.Arguments, dtype: torch.dtype) -> None:
    """Gradients of rows are judged row by row, as outputs are. Those of weights and biases may be off by one rounding,
    and by a share of the sum of the terms' magnitudes: one rounding in fp32 for each row, and the arithmetic of a
    row."""
    rows = 256
    a = samples.arguments(OPS[name], (rows, 64), dtype, **variant)
    grads = [inputs.make("normal", (rows, 64), dtype, seed) for seed in (7, 8)][: 2 if name == "add_rmsnorm" else 1]
    ours, truth, plain = (of(name, a, *grads) for of in (gradients, true_gradients, fp32_gradients))
    alike = samples.alike(OPS[name])
    one_a_row = a | {key: a[key].expand(rows, 64) for key in ("weight", "bias") if key in a}
    terms = true_gradients(name, one_a_row, *grads)
    for key, found in ours.items():
        assert found.dtype == a[key].dtype
        if key in alike:
            judge.no_worse(found, plain[key], truth[key])
        else:
            magnitudes = sum(terms[other].abs().sum(0) for other in ("weight", "bias") if other in terms)
            bound = (rows + bounds.ROUNDINGS) * bounds.rounding(dtype) * magnitudes
            assert ulps.excess(found, bound, truth[key]) == 0, key


# --- fp32 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rmsnorm", "layernorm"])
def test_dx_is_rounded_twice(backend: Backend, name: str) -> None:
    """Only two values of dx's size are rounded, dy * w (less its mean) and dx itself: it is no further from fp64 than
    that, with the same statistics in fp32. A third rounding is seen, where statistics do not differ as they do
    between torch and a kernel on a GPU, whose rsqrt is off by digits of its own."""
    shape = (128, 512)
    a = backend.arguments(OPS[name], shape, torch.float32)
    dy = backend.make("normal", shape, torch.float32, 7)
    ours, truth = (of(name, a, dy)["input"] for of in (gradients, true_gradients))
    h, dw, shift = a["input"], dy * a["weight"], torch.zeros_like(dy[:, :1])
    if name == "layernorm":
        h, shift = h - h.mean(-1, keepdim=True), dw.mean(-1, keepdim=True)
    s = torch.rsqrt(h.square().mean(-1, keepdim=True) + a["eps"])
    small = h * s * (dw * h * s).mean(-1, keepdim=True) + shift
    twice = (dw.double() * s.double() - (s * small).double()).float()
    judge.no_worse(ours, twice, truth)
    with pytest.raises(AssertionError, match="error"):
        judge.no_worse((dw - small) * s, twice, truth)
