"""The tests of mamba_ssm, FLA, Quack and Liger for norms and their gradients, on our kernels.

On a GPU all cases run, with their shapes. In the interpreter they have at most MOST_COLUMNS columns and MOST_ROWS rows,
and a third of Quack's RMSNorms run, with one number of rows. References are the formulas that the suites name, through
autograd, in blocks of rows that fit the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import norm_plugin
from norm_plugin import dispatch, settings
from norm_plugin.accuracy import bounds, oracle, ulps
from norm_plugin.gradients import RMSNORM_BACKWARD
from tests.kernels.device import COMPILED, DEVICE, on_a_gpu
from tests.kernels.public_cases import BF16, CASES, FP32, Case
from tests.spec import judge

MOST_COLUMNS, MOST_ROWS = 2100, 3
ALONE = 2**27  # elements, above which a case wants the GPU for itself
BLOCK = 2**25  # elements of a reference at once

Tensors = dict[str, Tensor]


def small(case: Case) -> Case | None:
    """The part of a case that an interpreter can do."""
    if case.shape[-1] > MOST_COLUMNS or case.rows > 2**20 or (case.suite == "quack" and case.rows in (1, 199, 8192)):
        return None
    if case.kind == "rms" and case.suite == "quack" and CASES.index(case) % 3:
        return None
    rows = case.rows if case.rows <= MOST_ROWS else MOST_ROWS
    return replace(case, shape=(rows, case.shape[-1]))


def chosen() -> list[Any]:
    if COMPILED:
        marks = {True: [pytest.mark.alone], False: []}
        return [pytest.param(c, marks=marks[c.rows * c.shape[-1] >= ALONE], id=c.id) for c in CASES]
    kept = {case.id: case for case in map(small, CASES) if case is not None}
    return [pytest.param(case, id=name) for name, case in kept.items()]


# --- inputs -------------------------------------------------------------------------------------------------------


def randn(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, dtype=dtype, device=DEVICE)


def tensors(case: Case) -> Tensors:
    torch.manual_seed(0)
    width, made = case.shape[-1], {"x": randn(*case.shape, dtype=case.dtype)}
    if case.layout == "every second":
        made["x"] = randn(*case.shape[:-1], 2 * width, dtype=case.dtype)[..., ::2]
    elif case.layout == "of 576":
        made["x"] = randn(*case.shape[:-1], width + 64, dtype=case.dtype)[..., :width]
    elif case.layout == "shifted":
        made["x"] = made["x"] * 0.5 + 0.3
    if case.kind == "add":
        made["r"] = randn(*case.shape, dtype=case.dtype)
    if case.how.get("z"):
        made["z"] = randn(*case.shape, dtype=case.dtype)
    if case.weights is not None:
        made["w"] = randn(width, dtype=case.weights)
        if case.suite == "liger":
            made["w"].fill_(1)
    if case.bias:
        made["b"] = randn(width, dtype=case.weights or case.dtype)
    if case.kind == "linear":
        made["lw"], made["lb"] = 0.01 * randn(width, width, dtype=case.dtype), 0.01 * randn(width, dtype=case.dtype)
    return made


def incoming(case: Case, outputs: list[Tensor]) -> list[Tensor]:
    if case.grads == "ones":  # of a sum: one number, expanded
        return [torch.ones((), dtype=out.dtype, device=out.device).expand(out.shape) for out in outputs]
    return [torch.randn_like(out) for out in outputs]


# --- both sides ---------------------------------------------------------------------------------------------------


def ours(case: Case, t: Tensors) -> list[Tensor]:
    x, w, b, how = t["x"], t.get("w"), t.get("b"), dict(case.how)
    eps, gated = how.pop("eps", 1e-6), {k: v for k, v in how.items() if k != "z"}
    found: Any = {
        "rms": lambda: norm_plugin.rmsnorm(x, w, eps, **how),
        "add": lambda: norm_plugin.add_rmsnorm(x, t["r"], w, eps, **how),
        "layer": lambda: norm_plugin.layernorm(x, w, b, eps),
        "gated": lambda: norm_plugin.layernorm_fn(x, w, b, z=t.get("z"), eps=eps, **gated),
        "l2": lambda: norm_plugin.l2norm(x, eps),
        "linear": lambda: norm_plugin.layernorm_linear(x, w, b, t["lw"], t["lb"], eps),
    }[case.kind]()
    return list(found) if isinstance(found, tuple) else [found]


def formula(case: Case, t: Tensors, wide: bool) -> list[Tensor]:
    """Their formula: in fp32 with one rounding or with Llama's two, or (not `wide`) in the dtypes of the arguments."""
    x, how = t["x"], case.how
    t = {name: value.float() for name, value in t.items()} if wide else t
    if case.kind == "l2":
        return [F.normalize(x, dim=-1, p=2)]
    h = total = t["x"] + t["r"] if "r" in t else t["x"]
    gate = None
    if "z" in t:
        gate = torch.sigmoid(t["z"]) if how.get("activation") == "sigmoid" else F.silu(t["z"])
        h = h if how.get("norm_before_gate", True) else h * gate
    groups = h.unflatten(-1, (-1, how.get("group_size") or h.shape[-1]))
    if case.kind in ("layer", "linear") or how.get("is_rms_norm") is False:
        groups = groups - groups.mean(-1, keepdim=True)
    y = (groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + how["eps"])).flatten(-2)
    y = y.to(x.dtype).to(y.dtype) if case.reference == "llama" else y
    y = y * (t["w"] + 1 if how.get("gemma") else t["w"]) if "w" in t else y
    y = y + t["b"] if "b" in t else y
    y = y * gate if gate is not None and how.get("norm_before_gate", True) else y
    y = F.linear(y, t["lw"], t["lb"]) if "lw" in t else y
    return [y.to(x.dtype), *([total.to(x.dtype)] if "r" in t else [])]


BY_ROW = ("x", "r", "z")


def reference(case: Case, t: Tensors, grads: list[Tensor], wide: bool) -> Iterator[tuple[slice, dict[str, Tensor]]]:
    """The blocks of rows with their outputs and gradients, then the gradients of the weights."""
    step = max(1, BLOCK // case.shape[-1])
    flat = {name: t[name].detach().reshape(-1, case.shape[-1]) for name in BY_ROW if name in t}
    shared = {name: value.detach() for name, value in t.items() if name not in BY_ROW}
    sums = {name: torch.zeros_like(value, dtype=FP32) for name, value in shared.items()}
    for start in range(0, case.rows, step):
        block = slice(start, start + step)
        leaves = {name: value[block].clone().requires_grad_() for name, value in flat.items()}
        # in fp32 the gradients of several blocks add up unrounded
        leaves |= {name: (value.float() if wide else value).clone().requires_grad_() for name, value in shared.items()}
        outputs = formula(case, leaves, wide)
        of_block = [g.reshape(-1, g.shape[-1])[block] for g in grads]
        found = torch.autograd.grad(outputs[: len(grads)], list(leaves.values()), of_block)
        named = dict(zip((f"d{name}" for name in leaves), found, strict=True))
        for name in shared:
            sums[name] += named.pop(f"d{name}")
        yield block, {f"out {i}": out.detach() for i, out in enumerate(outputs)} | named
    yield slice(0), {f"d{name}": total.to(shared[name].dtype) for name, total in sums.items()}


# --- their criteria -----------------------------------------------------------------------------------------------


class Twice:
    """mamba_ssm: at most twice the error of the formula in the dtypes of its arguments, and a little more."""

    def __init__(self, case: Case, t: Tensors, grads: list[Tensor]) -> None:
        unrounded = not case.how["is_rms_norm"] and case.how["group_size"] is None  # which it computes in fp32
        self.plain = reference(case, t, grads, wide=unrounded)
        self.off: dict[str, list[Tensor]] = {}
        self.theirs: dict[str, list[Tensor]] = {}

    def add(self, name: str, found: Tensor, truth: Tensor, limit: tuple[float, float] | None) -> None:
        self.off.setdefault(name, []).append((found.float() - truth.float()).abs().max())

    def block(self, truth: Tensors) -> None:
        for name, value in next(self.plain)[1].items():
            self.theirs.setdefault(name, []).append((value.float() - truth[name].float()).abs().max())

    def finish(self, limit: tuple[float, float]) -> None:
        for name, off in self.off.items():
            assert max(off) <= 2 * max(self.theirs[name]) + limit[1], name


class Relative:
    """FLA: the root mean square of the difference over that of the reference, or a negligible difference."""

    def __init__(self) -> None:
        self.sums: dict[str, list[float]] = {}
        self.limits: dict[str, tuple[float, float]] = {}

    def add(self, name: str, found: Tensor, truth: Tensor, limit: tuple[float, float]) -> None:
        off = (found.float() - truth.float()).abs()
        sums = self.sums.setdefault(name, [0.0, 0.0, 0.0])
        sums[0] += float(off.double().square().sum())
        sums[1] += float(truth.double().square().sum())
        sums[2] = max(sums[2], float(off.max()))
        self.limits[name] = limit

    def finish(self) -> None:
        for name, (off, size, largest) in self.sums.items():
            ratio, least = self.limits[name]
            assert largest <= least or off**0.5 < ratio * size**0.5, (name, off**0.5 / size**0.5, largest)


def close(name: str, found: Tensor, truth: Tensor, limit: tuple[float, float] | None) -> None:
    """Quack and Liger: torch.testing.assert_close. Without a limit the gradient of a weight may be off by two roundings
    of its reference."""
    rtol, atol = limit or (1e-3, 2 * float((truth + 0.3 - 0.3 - truth).abs().max()))
    torch.testing.assert_close(found, truth, rtol=rtol, atol=atol, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("case", chosen())
def test_a_public_case(case: Case) -> None:
    refused = case.layout == "every second"  # which FLA copies, and here is PyTorch's, with the reason
    with settings.override(strict=False) if refused else nullcontext():
        judged(case)
        routes = dispatch.routes()
    assert {route.op.name.endswith("_backward") for route in routes} == {False, True}
    if refused:
        assert all(route.reason.startswith("the last stride is 2") for route in routes)
    else:
        assert {route.backend for route in routes} == {"triton"}


def judged(case: Case) -> None:
    t = tensors(case)
    leaves = {name: value.requires_grad_() for name, value in t.items()}
    outputs = ours(case, leaves)
    grads = incoming(case, outputs)[: 1 if case.grads == "first" else None]
    found = dict(zip((f"d{name}" for name in leaves), torch.autograd.grad(outputs[: len(grads)], list(leaves.values()),
                                                                         grads), strict=True))  # fmt: skip
    found |= {f"out {i}": out.detach() for i, out in enumerate(outputs)}
    of_x, of_weights = case.limits
    twice = Twice(case, t, grads) if case.suite == "mamba" else None
    relative = Relative() if case.suite == "fla" else None
    add: Callable[..., None] = twice.add if twice else relative.add if relative else close
    seen = set()
    for block, truth in reference(case, t, grads, wide=case.reference != "none"):
        if twice:
            twice.block(truth)
        for name, value in truth.items():
            by_row = name.startswith("out") or name[1:] in BY_ROW
            mine = found[name].reshape(-1, found[name].shape[-1])[block] if by_row else found[name]
            assert mine.dtype == value.dtype
            add(name, mine, value, of_x if by_row else of_weights)
            seen.add(name)
    assert seen == set(found)
    if twice:
        twice.finish(of_x)
    if relative:
        relative.finish()


@pytest.mark.parametrize("suite", ["mamba", "fla", "quack", "liger"])
def test_a_wrong_gradient_is_seen(suite: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The criteria can fail: on gradients that are a quarter too large."""
    case = next(
        c for c in (CASES if COMPILED else map(small, CASES)) if c is not None and c.suite == suite and c.weights
    )
    for name in ("layernorm_fn", "layernorm", "rmsnorm"):
        monkeypatch.setattr(norm_plugin, name, larger(getattr(norm_plugin, name)))
    if suite == "liger":
        case = replace(case, shape=(64, 512), dtype=BF16, weights=BF16, limits=((2e-2, 2e-1), (2e-2, 2e-1)))
    with pytest.raises(AssertionError):
        judged(case)


def larger(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same values, with 1.25 times the gradients."""

    def wrong(*args: Any, **named: Any) -> Tensor:
        out = function(*args, **named)
        return out * 1.25 - out.detach() * 0.25

    return wrong


def test_a_gradient_of_another_dtype() -> None:
    """Quack's test_amp_bf16_training: dy in bf16, all else in fp32. A GPU reads a bf16 dy in other vectors, so it sums
    the row in another order: with errors of the same size, within the bounds of the sums."""
    rows = 32768 if COMPILED else 64
    x, dy, w = randn(rows, 1024, dtype=FP32), randn(rows, 1024, dtype=BF16), randn(1024, dtype=FP32)
    dx, dw = dispatch.call(RMSNORM_BACKWARD, dy, x, w, None, 1e-6, False, None, True)
    assert (dx.dtype, dw.dtype) == (FP32, FP32)
    same = dispatch.call(RMSNORM_BACKWARD, dy.float(), x, w, None, 1e-6, False, None, True)
    h, wide = x.double().requires_grad_(), w.double().requires_grad_()
    truth = torch.autograd.grad(oracle.rmsnorm(h, wide, 1e-6), (h, wide), dy.double())
    judge.no_worse(dx, same[0], truth[0])
    judge.no_worse(same[0], dx, truth[0])
    magnitudes = (dy.double() * h.detach() * oracle.inverse_root(h.detach(), 1e-6, None)).abs().sum(0)
    for found in (dw, same[1]):
        assert ulps.excess(found, (rows + bounds.ROUNDINGS) * bounds.rounding(FP32) * magnitudes, truth[1]) == 0


@on_a_gpu
def test_all_cases_are_run_here() -> None:
    assert len(chosen()) == len(CASES)
