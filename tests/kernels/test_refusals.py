"""What a kernel cannot do: it says why, the native op does it, that is counted, and NORM_PLUGIN_STRICT=1 raises.

The grid: every op x every reason that it can have. A kernel that fails is shown on one that is made to fail.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import norm_plugin
from norm_plugin import dispatch, kernels, settings
from norm_plugin.native import rms
from norm_plugin.numerics import (
    DESCRIPTION,
    GATED_NUMERICS,
    LAYER_NUMERICS,
    LAYER_QUANT_NUMERICS,
    NUMERICS,
    Numerics,
)
from norm_plugin.op import Op
from norm_plugin.ops import OPS
from tests.kernels import twins
from tests.kernels.twins import TRITON
from tests.spec import judge, layouts, samples

BF16 = torch.bfloat16


class Refused(NamedTuple):
    """A call that no kernel does: the beginning of the reason, how it is made, and what becomes of single tensors."""

    op: Op
    reason: str
    made: samples.Arguments
    changed: dict[str, Callable[[Tensor], Tensor]]


def every_second(x: Tensor) -> Tensor:
    """A last stride of 2."""
    return torch.stack([x, x], -1).flatten(-2)[..., ::2]


def gaps(x: Tensor) -> Tensor:
    """Unused memory after every dimension, so that no two of them are one."""
    buffer = x.new_full([size + 1 for size in x.shape], 7)
    return buffer[tuple(slice(0, size) for size in x.shape)].copy_(x)


def refusals(op: Op) -> Iterator[tuple[str, Refused]]:
    """Every reason that an op can have, with a name."""
    fp32 = "the kernels compute in fp32 and take fp16, bf16 and fp32, not torch.float64"
    yield "fp64", Refused(op, fp32, {"dtype": torch.float64}, {})
    five = {"shape": (2, 3, 2, 3, 48)}
    grid = "the rows do not lie on a grid of at most three strides"
    yield "four strides", Refused(op, grid, five, dict.fromkeys(samples.alike(op), gaps))
    read = [name for place, name in enumerate(op.arguments) if name in twins.READ and place not in op.written]
    for name in read:
        stride = "the last stride is 2, and the kernels read rows of stride 1"
        yield f"{name} of stride 2", Refused(op, stride, {}, {name: every_second})
    if "weight" in read:
        yield "a weight in fp64", Refused(op, fp32, {"weight_dtype": torch.float64}, {})
    if "variance_size" in op.arguments:
        columns = "the variance is of the first 24 columns only"
        yield "a part of the columns", Refused(op, columns, {"variance_size": 24}, {})
    if "output_dtype" in op.arguments:
        yield "an output in fp64", Refused(op, fp32, {"output_dtype": torch.float64}, {})
    if op.name in ("layernorm", "gated_norm", "split_sums", "split_rmsnorm"):
        own = "the kernel cannot do what torch_functions says of numerics 'torch'"
        yield "PyTorch's own functions", Refused(op, own, {"numerics": "torch"}, {})
    if op.name == "rmsnorm_block_quant":
        blocks = "blocks of 24 columns do not divide the kernel's chunks of 64"
        yield "blocks of 24", Refused(op, blocks, {"group_size": 24}, {})


CASES = [(f"{name}: {what}", case) for name, op in OPS.items() for what, case in refusals(op)]
every_refusal = pytest.mark.parametrize("case", [case for _, case in CASES], ids=[name for name, _ in CASES])


@pytest.fixture(autouse=True)
def nothing_logged_yet() -> None:
    dispatch.log_once.cache_clear()


def arguments(case: Refused) -> samples.Arguments:
    made = {"shape": (4, 3, 48), "dtype": BF16} | case.made
    a = TRITON.arguments(case.op, **made)
    return a | {name: change(a[name]) for name, change in case.changed.items() if a[name] is not None}


def the_route() -> dispatch.Route:
    (route,) = dispatch.routes()
    return route


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@every_refusal
def test_what_is_refused_is_native_counted_and_said_once(case: Refused, caplog: pytest.LogCaptureFixture) -> None:
    op, a = case.op, arguments(case)
    with settings.override(strict=False):
        for _ in range(2):
            outputs = samples.outputs(op, a)
        route = the_route()
        assert route.reason.startswith(case.reason)
        assert (route.backend, route.fallback) == ("native", True)
        assert (dispatch.calls(op.name, "native"), dispatch.calls(op.name, "triton")) == (2, 0)
    judge.check(op, a, outputs)
    assert warnings_of(caplog) == [f"{op.name} runs on the native path: {route.reason}"]


@every_refusal
def test_strict_refuses_it(case: Refused) -> None:
    with pytest.raises(dispatch.BackendError, match=re.escape(f"{case.op.name} cannot run on Triton: {case.reason}")):
        samples.outputs(case.op, arguments(case))
    assert dispatch.calls(case.op.name) == 0


def test_a_scale_may_have_any_dtype() -> None:
    """It is one number, and becomes fp32 in the kernel as in the native op."""
    for name in ("rmsnorm_quant", "fused_add_rmsnorm_quant", "layernorm_quant"):
        for dtype in (torch.float16, BF16, torch.float64):
            a = TRITON.arguments(OPS[name], (4, 48), BF16, scale=torch.tensor(0.02, dtype=dtype))
            assert all(
                twins.same_bits(*pair)
                for pair in zip(
                    samples.outputs(OPS[name], a),
                    samples.outputs(OPS[name], a | {"scale": a["scale"].float()}),
                    strict=True,
                )
            )


# --- numerics -----------------------------------------------------------------------------------------------------


FIELDS = [field.name for field in dataclasses.fields(Numerics) if field.name not in DESCRIPTION]
READ_BY_RMS = [field for field in FIELDS if any(getattr(numerics, field) for numerics in NUMERICS.values())]
READ_BY_GATED = ["round_before_weight"]
READ_BY_LAYER_QUANT = ["round_before_quant"]


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize(
    ("op", "known", "read"),
    [
        ("rmsnorm", NUMERICS, READ_BY_RMS),
        ("rmsnorm_quant", NUMERICS, READ_BY_RMS),
        ("gated_norm", GATED_NUMERICS, READ_BY_GATED),
        ("layernorm", LAYER_NUMERICS, READ_BY_GATED),
        ("layernorm_quant", LAYER_QUANT_NUMERICS, READ_BY_LAYER_QUANT),
    ],
)
def test_a_field_that_a_kernel_does_not_read_is_refused(
    op: str, known: dict[str, Numerics], read: list[str], field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that no numerics had when the kernel was written: it changes what runs, or it is refused."""
    made = Numerics("made up", "", "", **{field: True})
    monkeypatch.setitem(known, made.name, made)
    kernel = kernels.find(OPS[op].kind, op)
    assert kernel is not None
    a = TRITON.arguments(OPS[op], (4, 48), BF16) | {"numerics": made.name}
    if field in read:
        kernel(*a.values())
    else:
        with pytest.raises(kernels.Refusal, match=f"cannot do what {field} says of numerics 'made up'"):
            kernel(*a.values())


# --- kernels that fail --------------------------------------------------------------------------------------------


class Failing:
    """A kernel that cannot be compiled."""

    def __init__(self) -> None:
        self.tried = 0

    def warmup(self, *args: Any, **options: Any) -> Any:
        self.tried += 1
        raise RuntimeError("ptxas died\nand this is its log")


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Failing:
    """rmsnorm on a kernel that fails; all else as it is."""
    import norm_plugin.kernels.rms

    kernel = Failing()
    monkeypatch.setattr(norm_plugin.kernels.rms, "rms_kernel", kernel)
    return kernel


def test_a_kernel_that_fails_is_native_from_then_on(failing: Failing, caplog: pytest.LogCaptureFixture) -> None:
    """That op, dtype and width, in whatever layout; another width or dtype is tried, and other ops are not touched."""
    x, reason = TRITON.make("normal", (4, 48), BF16), "the Triton kernel failed: RuntimeError: ptxas died"
    with settings.override(strict=False):
        for rows in (x, x, layouts.padded(x), x.view(2, 2, 48)):
            assert torch.equal(norm_plugin.rmsnorm(rows, None), rms.rmsnorm(rows, None))
        assert failing.tried == 1
        assert {(route.backend, route.reason, route.fallback) for route in dispatch.routes()} == {
            ("native", reason, True)
        }
        assert dispatch.calls("rmsnorm", "native") == 4
        norm_plugin.rmsnorm(x.float(), None)
        norm_plugin.rmsnorm(TRITON.make("normal", (4, 64), BF16), None)
        assert failing.tried == 3
        norm_plugin.layernorm(x, None, None)
        assert dispatch.calls("layernorm", "triton") == 1
    assert warnings_of(caplog)[0] == f"rmsnorm stays on the eager native path: {reason}"
    assert len(warnings_of(caplog)) == len(set(warnings_of(caplog)))


def test_strict_raises_where_a_kernel_fails(failing: Failing) -> None:
    x = TRITON.make("normal", (4, 48), BF16)
    for _ in range(2):
        with pytest.raises(dispatch.BackendError, match=r"rmsnorm: the Triton kernel failed: RuntimeError: ptxas died"):
            norm_plugin.rmsnorm(x, None)
