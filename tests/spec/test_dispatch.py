"""Which backend answers a call, why, and how often. The kernels are fake, so no GPU is needed."""

from __future__ import annotations

import importlib.util

import pytest
import torch

import norm_plugin
from norm_plugin import dispatch, kernels, settings
from norm_plugin.native import rms
from tests.spec import layouts
from tests.spec.fake_kernels import FakeKernel, Install, the_route, warnings_of, x_of

pytestmark = pytest.mark.usefixtures("nothing_seen_yet")

ON_THE_CPU = "Triton compiles for GPUs, and the tensors are on the CPU"


# --- which backend ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", ["off", "auto"])
def test_auto_takes_native_on_a_cpu_in_silence(asked: str, caplog: pytest.LogCaptureFixture) -> None:
    """`off` is for engines: a direct call takes it as `auto`. On a CPU nobody expects a GPU kernel."""
    with settings.override(backend=asked, strict=True):
        norm_plugin.rmsnorm(x_of(), None)
        route = the_route()
    assert (route.backend, route.reason, route.fallback) == ("native", ON_THE_CPU, False)
    assert warnings_of(caplog) == []


def test_native_is_no_fallback_where_it_was_asked_for(install: Install) -> None:
    kernel = install(FakeKernel())
    with settings.override(backend="native", strict=True):
        norm_plugin.rmsnorm(x_of(), None)
        assert (the_route().backend, the_route().fallback) == ("native", False)
        assert the_route().reason == "the native backend was asked for"
    assert kernel.bound == 0


def test_triton_on_a_cpu_falls_back_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    with settings.override(backend="triton"):
        for width in (16, 32, 48):
            norm_plugin.rmsnorm(x_of(width=width), None)
        assert {(r.backend, r.reason, r.fallback) for r in dispatch.routes()} == {("native", ON_THE_CPU, True)}
    assert warnings_of(caplog) == [f"rmsnorm runs on the native path: {ON_THE_CPU}"]


def test_strict_refuses_a_fallback() -> None:
    with settings.override(backend="triton", strict=True):
        for _ in range(2):
            with pytest.raises(dispatch.BackendError, match=rf"rmsnorm cannot run on Triton: {ON_THE_CPU}.*STRICT=1"):
                norm_plugin.rmsnorm(x_of(), None)
        assert dispatch.calls("rmsnorm") == 0


def test_triton_absent_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert kernels.unavailable(torch.device("cpu")) == "triton is not installed"


@pytest.mark.parametrize("asked", ["off", "auto", "triton"])
def test_a_kernel_is_taken_where_there_is_one(install: Install, asked: str) -> None:
    kernel = install(FakeKernel())
    x = x_of()
    with settings.override(backend=asked, strict=True):
        assert torch.equal(norm_plugin.rmsnorm(x, None), rms.rmsnorm(x, None))
        assert (the_route().backend, the_route().reason, the_route().fallback) == ("triton", "", False)
    assert (kernel.bound, kernel.ran) == (1, 1)


def test_an_op_without_a_kernel_is_a_reason(install: Install) -> None:
    install(None)
    with settings.override(backend="triton"):
        norm_plugin.l2norm(x_of())
        assert (the_route().reason, the_route().fallback) == ("l2norm has no Triton kernel", True)


def test_a_refusal_is_a_reason(install: Install, caplog: pytest.LogCaptureFixture) -> None:
    kernel = install(FakeKernel(refusal="it is Sunday"))
    x = x_of()
    with settings.override(backend="triton"):
        for _ in range(3):
            assert torch.equal(norm_plugin.rmsnorm(x, None), rms.rmsnorm(x, None))
        assert (the_route().backend, the_route().reason, the_route().fallback) == ("native", "it is Sunday", True)
    assert (kernel.bound, kernel.ran) == (1, 0)
    assert warnings_of(caplog) == ["rmsnorm runs on the native path: it is Sunday"]


def test_kernels_that_cannot_be_imported_are_a_reason(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(kind: str, op: str) -> None:
        raise ImportError("libtriton.so is missing")

    install(None)
    monkeypatch.setattr(kernels, "find", broken)
    with settings.override(backend="triton"):
        norm_plugin.rmsnorm(x_of(), None)
        assert the_route().reason == "the Triton kernels cannot be imported: libtriton.so is missing"


# --- signatures and counts ----------------------------------------------------------------------------------------


def test_the_number_of_rows_is_not_part_of_a_signature(install: Install) -> None:
    kernel = install(FakeKernel())
    with settings.override(backend="triton"):
        for rows in (1, 2, 3, 64, 0, 257):
            norm_plugin.rmsnorm(x_of(rows), None)
        assert the_route().calls == 6
    assert (kernel.bound, kernel.ran) == (1, 6)


def test_width_dtype_strides_and_plain_arguments_are(install: Install) -> None:
    kernel = install(FakeKernel())
    calls = [
        (x_of(),),
        (x_of(width=64),),
        (x_of(dtype=torch.bfloat16),),
        (layouts.padded(x_of()),),
        (x_of().view(2, 2, 48),),
        (x_of(), 1e-5),
        (x_of(), None),
    ]
    with settings.override(backend="triton"):
        for x, *eps in calls:
            norm_plugin.rmsnorm(x, None, *[value for value in eps if value])
        assert [route.calls for route in dispatch.routes()] == [2, 1, 1, 1, 1, 1]
    assert (kernel.bound, kernel.ran) == (6, 7)


def test_both_doors_are_counted_together(install: Install) -> None:
    install(FakeKernel())
    x = x_of()
    with settings.override(backend="triton"):
        norm_plugin.rmsnorm(x, None)
        torch.ops.norm_plugin.rmsnorm(x, None)
        norm_plugin.rmsnorm(x.requires_grad_(), None)
        assert dispatch.calls("rmsnorm") == dispatch.calls("rmsnorm", "triton") == 3


def test_counts_by_op_and_backend_outlive_a_change_of_settings(install: Install) -> None:
    install(FakeKernel())
    x = x_of()
    with settings.override(backend="triton"):
        norm_plugin.rmsnorm(x, None)
        norm_plugin.l2norm(x)
        with settings.override(backend="native"):
            norm_plugin.rmsnorm(x, None)
            norm_plugin.rmsnorm(x, None)
            assert dispatch.calls("rmsnorm", "native") == 2
        norm_plugin.rmsnorm(x, None)
        assert dispatch.calls("rmsnorm", "triton") == 2
        assert dispatch.calls("rmsnorm") == 4
        assert dispatch.calls("l2norm", "native") == 1
        dispatch.reset()
        assert dispatch.calls("rmsnorm") == 0
        assert dispatch.routes() == ()


def test_a_refused_call_is_not_counted() -> None:
    with pytest.raises(ValueError, match="weight has shape"):
        norm_plugin.rmsnorm(x_of(), torch.ones(47))
    norm_plugin.rmsnorm(x_of(), torch.ones(48))
    with pytest.raises(ValueError, match="residual has shape"):
        norm_plugin.add_rmsnorm(x_of(), x_of(5), torch.ones(48))
    assert dispatch.calls("rmsnorm") == 1
    assert dispatch.calls("add_rmsnorm") == 0


def test_signatures_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "MOST_ROUTES", 10)
    for width in range(1, 36):
        norm_plugin.rmsnorm(x_of(width=width), None)
    assert len(dispatch.routes()) <= 10
    assert dispatch.calls("rmsnorm") == 35
