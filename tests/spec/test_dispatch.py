"""Which backend answers a call, why, and how often: with kernels that are made up, so that no GPU is needed."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import norm_plugin
from norm_plugin import dispatch, kernels, settings
from norm_plugin.native import rms
from norm_plugin.verify import inputs

ON_THE_CPU = "Triton compiles for GPUs, and the tensors are on the CPU"


@pytest.fixture(autouse=True)
def nothing_seen_yet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    dispatch._logged.clear()
    dispatch.reset()
    yield
    dispatch.reset()


class FakeKernel:
    """rmsnorm as a kernel that counts: how often it was bound to a signature, and how often it ran."""

    def __init__(self, run: Callable[..., Any] | None = None, refusal: str = "") -> None:
        self.bound, self.ran, self.refusal = 0, 0, refusal
        self.body = run or (lambda *args: rms.rmsnorm(*args[:-1]))

    def __call__(self, *args: Any) -> Callable[..., Any]:
        self.bound += 1
        if self.refusal:
            raise kernels.Refusal(self.refusal)
        return self.run

    def run(self, *args: Any) -> Any:
        self.ran += 1
        return self.body(*args)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[FakeKernel | None], FakeKernel | None]:
    """Make a kernel the one of rmsnorm, on any device."""

    def install(kernel: FakeKernel | None) -> FakeKernel | None:
        monkeypatch.setattr(kernels, "unavailable", lambda device: "")
        monkeypatch.setattr(kernels, "find", lambda family, op: kernel if op == "rmsnorm" else None)
        return kernel

    return install


def x_of(rows: int = 4, width: int = 48, dtype: torch.dtype = torch.float32) -> Tensor:
    return inputs.make("normal", (rows, width), dtype)


def the_route() -> dispatch.Route:
    (route,) = dispatch.routes()
    return route


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# --- which backend ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["off", "auto"])
def test_auto_takes_native_on_a_cpu_in_silence(backend: str, caplog: pytest.LogCaptureFixture) -> None:
    """off concerns the engines: a direct call takes it for auto. Nobody expects a GPU kernel on a CPU."""
    with settings.override(backend=backend, strict=True):
        norm_plugin.rmsnorm(x_of(), None)
        route = the_route()
    assert (route.backend, route.reason, route.fallback) == ("native", ON_THE_CPU, False)
    assert warnings_of(caplog) == []


def test_native_is_no_fallback_where_it_was_asked_for(install: Any) -> None:
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


@pytest.mark.parametrize("backend", ["off", "auto", "triton"])
def test_a_kernel_is_taken_where_there_is_one(install: Any, backend: str) -> None:
    kernel = install(FakeKernel())
    x = x_of()
    with settings.override(backend=backend, strict=True):
        assert torch.equal(norm_plugin.rmsnorm(x, None), rms.rmsnorm(x, None))
        assert (the_route().backend, the_route().reason, the_route().fallback) == ("triton", "", False)
    assert (kernel.bound, kernel.ran) == (1, 1)


def test_an_op_without_a_kernel_is_a_reason(install: Any) -> None:
    install(None)
    with settings.override(backend="triton"):
        norm_plugin.l2norm(x_of())
        assert (the_route().reason, the_route().fallback) == ("l2norm has no Triton kernel", True)


def test_a_refusal_is_a_reason(install: Any, caplog: pytest.LogCaptureFixture) -> None:
    kernel = install(FakeKernel(refusal="it is Sunday"))
    x = x_of()
    with settings.override(backend="triton"):
        for _ in range(3):
            assert torch.equal(norm_plugin.rmsnorm(x, None), rms.rmsnorm(x, None))
        assert (the_route().backend, the_route().reason, the_route().fallback) == ("native", "it is Sunday", True)
    assert (kernel.bound, kernel.ran) == (1, 0)
    assert warnings_of(caplog) == ["rmsnorm runs on the native path: it is Sunday"]


def test_kernels_that_cannot_be_imported_are_a_reason(install: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(family: str, op: str) -> None:
        raise ImportError("libtriton.so is missing")

    install(None)
    monkeypatch.setattr(kernels, "find", broken)
    with settings.override(backend="triton"):
        norm_plugin.rmsnorm(x_of(), None)
        assert the_route().reason == "the Triton kernels cannot be imported: libtriton.so is missing"


# --- signatures and counts ----------------------------------------------------------------------------------------


def test_the_number_of_rows_is_not_part_of_a_signature(install: Any) -> None:
    kernel = install(FakeKernel())
    with settings.override(backend="triton"):
        for rows in (1, 2, 3, 64, 0, 257):
            norm_plugin.rmsnorm(x_of(rows), None)
        assert the_route().calls == 6
    assert (kernel.bound, kernel.ran) == (1, 6)


def test_width_dtype_strides_and_plain_arguments_are(install: Any) -> None:
    kernel = install(FakeKernel())
    calls = [
        (x_of(),),
        (x_of(width=64),),
        (x_of(dtype=torch.bfloat16),),
        (inputs.padded(x_of()),),
        (x_of().view(2, 2, 48),),
        (x_of(), 1e-5),
        (x_of(), None),
    ]
    with settings.override(backend="triton"):
        for x, *eps in calls:
            norm_plugin.rmsnorm(x, None, *[value for value in eps if value])
        assert [route.calls for route in dispatch.routes()] == [2, 1, 1, 1, 1, 1]
    assert (kernel.bound, kernel.ran) == (6, 7)


def test_both_doors_are_counted_together(install: Any) -> None:
    install(FakeKernel())
    x = x_of()
    with settings.override(backend="triton"):
        norm_plugin.rmsnorm(x, None)
        torch.ops.norm_plugin.rmsnorm(x, None)
        norm_plugin.rmsnorm(x.requires_grad_(), None)
        assert dispatch.calls("rmsnorm") == dispatch.calls("rmsnorm", "triton") == 3


def test_counts_by_op_and_backend_outlive_a_change_of_settings(install: Any) -> None:
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


# --- kernels that fail --------------------------------------------------------------------------------------------


def failing(error: BaseException) -> FakeKernel:
    def run(*args: Any) -> Any:
        raise error

    return FakeKernel(run)


def test_a_kernel_that_fails_at_its_first_call_is_logged_once_and_left(
    install: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Its call is answered by the native op, and so is every later one of this op, dtype and width."""
    kernel = install(failing(RuntimeError("ptxas died\nwith a long log")))
    x = x_of()
    reason = "the Triton kernel failed: RuntimeError: ptxas died"
    with settings.override(backend="auto"):
        for _ in range(3):
            assert torch.equal(norm_plugin.rmsnorm(x, None), rms.rmsnorm(x, None))
        assert (the_route().backend, the_route().reason, the_route().fallback) == ("native", reason, True)
        norm_plugin.rmsnorm(inputs.padded(x), None)
        assert {route.reason for route in dispatch.routes()} == {reason}
        assert dispatch.calls("rmsnorm", "native") == 4
        assert dispatch.calls("rmsnorm", "triton") == 0
        assert kernel.ran == 1
        norm_plugin.rmsnorm(x_of(width=64), None)
        assert kernel.ran == 2
    assert warnings_of(caplog)[0] == f"rmsnorm stays on the eager native path: {reason}"
    assert len(warnings_of(caplog)) == len(set(warnings_of(caplog)))


def test_new_settings_give_a_failed_kernel_another_chance(install: Any) -> None:
    with settings.override(backend="auto"):
        install(failing(RuntimeError("no luck")))
        norm_plugin.rmsnorm(x_of(), None)
        working = install(FakeKernel())
        norm_plugin.rmsnorm(x_of(), None)
        assert working.ran == 0
        with settings.override(backend="triton"):
            norm_plugin.rmsnorm(x_of(), None)
            assert working.ran == 1


def test_strict_refuses_a_kernel_that_fails(install: Any) -> None:
    error = RuntimeError("ptxas died")
    install(failing(error))
    with settings.override(backend="auto", strict=True):
        for _ in range(2):
            with pytest.raises(dispatch.BackendError, match=r"RuntimeError: ptxas died.*STRICT=1 forbids") as raised:
                norm_plugin.rmsnorm(x_of(), None)
            assert raised.value.__cause__ is error


def test_out_of_memory_is_no_failure_of_the_kernel(install: Any) -> None:
    """It passes through to whoever can free memory, and the kernel stays in use."""
    kernel = install(failing(torch.OutOfMemoryError("no memory left")))
    with settings.override(backend="auto"):
        with pytest.raises(torch.OutOfMemoryError, match="no memory left"):
            norm_plugin.rmsnorm(x_of(), None)
        kernel.body = FakeKernel().body
        norm_plugin.rmsnorm(x_of(), None)
        assert (the_route().backend, kernel.ran) == ("triton", 2)


def test_a_later_failure_passes_through(install: Any) -> None:
    """A kernel that has run does run: what it raises then belongs to the call, or to a device that is lost."""
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
