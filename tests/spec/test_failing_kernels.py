"""Kernels and compilers that fail: what answers the call, what is logged, and what is tried again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import norm_plugin
from norm_plugin import dispatch, settings
from norm_plugin.native import rms
from tests.spec import layouts
from tests.spec.fake_kernels import FakeKernel, Install, failing, the_route, warnings_of, x_of

pytestmark = pytest.mark.usefixtures("nothing_seen_yet")


def test_a_kernel_that_fails_at_its_first_call_is_logged_once_and_left(
    install: Install, caplog: pytest.LogCaptureFixture
) -> None:
    """The native op answers this call, and all later calls of this op, dtype and width."""
    kernel = install(failing(RuntimeError("ptxas died\nwith a long log")))
    x = x_of()
    reason = "the Triton kernel failed: RuntimeError: ptxas died"
    with settings.override(backend="auto"):
        for _ in range(3):
            assert torch.equal(norm_plugin.rmsnorm(x, None), rms.rmsnorm(x, None))
        assert (the_route().backend, the_route().reason, the_route().fallback) == ("native", reason, True)
        norm_plugin.rmsnorm(layouts.padded(x), None)
        assert {route.reason for route in dispatch.routes()} == {reason}
        assert dispatch.calls("rmsnorm", "native") == 4
        assert dispatch.calls("rmsnorm", "triton") == 0
        assert kernel.ran == 1
        norm_plugin.rmsnorm(x_of(width=64), None)
        assert kernel.ran == 2
    assert warnings_of(caplog)[0] == f"rmsnorm stays on the eager native path: {reason}"
    assert len(warnings_of(caplog)) == len(set(warnings_of(caplog)))


def test_new_settings_give_a_failed_kernel_another_chance(install: Install) -> None:
    with settings.override(backend="auto"):
        install(failing(RuntimeError("no luck")))
        norm_plugin.rmsnorm(x_of(), None)
        working = install(FakeKernel())
        norm_plugin.rmsnorm(x_of(), None)
        assert working.ran == 0
        with settings.override(backend="triton"):
            norm_plugin.rmsnorm(x_of(), None)
            assert working.ran == 1


def test_strict_refuses_a_kernel_that_fails(install: Install) -> None:
    error = RuntimeError("ptxas died")
    install(failing(error))
    with settings.override(backend="auto", strict=True):
        for _ in range(2):
            with pytest.raises(dispatch.BackendError, match=r"RuntimeError: ptxas died.*STRICT=1 forbids") as raised:
                norm_plugin.rmsnorm(x_of(), None)
            assert raised.value.__cause__ is error


def test_out_of_memory_is_no_failure_of_the_kernel(install: Install) -> None:
    """The error reaches the caller, who can free memory, and the kernel stays in use."""
    kernel = install(failing(torch.OutOfMemoryError("no memory left")))
    with settings.override(backend="auto"):
        with pytest.raises(torch.OutOfMemoryError, match="no memory left"):
            norm_plugin.rmsnorm(x_of(), None)
        kernel.body = FakeKernel().body
        norm_plugin.rmsnorm(x_of(), None)
        assert (the_route().backend, kernel.ran) == ("triton", 2)


def test_a_later_failure_passes_through(install: Install) -> None:
    """A kernel that has run before works, so a later error is of the call, or of a lost device."""
    kernel = install(FakeKernel())
    with settings.override(backend="auto"):
        norm_plugin.rmsnorm(x_of(), None)
        kernel.body = failing(RuntimeError("an illegal memory access")).body
        with pytest.raises(RuntimeError, match="an illegal memory access"):
            norm_plugin.rmsnorm(x_of(), None)
        assert the_route().backend == "triton"


def test_torch_compile_that_fails_leaves_the_eager_op(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*args: Any, **options: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            raise RuntimeError("no C++ compiler")

        return run

    monkeypatch.setattr(torch, "compile", fails)
    x = x_of()
    with settings.override(backend="native", compile=True):
        assert torch.equal(norm_plugin.rmsnorm(x, None), rms.rmsnorm(x, None))
        assert the_route().backend == "native"
        assert the_route().reason == "torch.compile failed: RuntimeError: no C++ compiler"
    assert len(warnings_of(caplog)) == 1
    with settings.override(backend="native", compile=True, strict=True), pytest.raises(dispatch.BackendError):
        norm_plugin.rmsnorm(x, None)
