"""How a kernel is launched: which road a call takes, that all of them give the same bits, and what one call allocates.

From the second call of a signature on, the short road calls the CUDA driver. Without a GPU all calls take the long
road, through Triton, and test_driver shows what the driver would get.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import norm_plugin
from norm_plugin import dispatch, settings
from norm_plugin.ops import OPS
from tests.kernels import twins
from tests.kernels.device import COMPILED, DEVICE, on_a_gpu
from tests.kernels.twins import TRITON
from tests.spec import layouts, samples

BF16 = torch.bfloat16


@pytest.fixture
def through_triton(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The launches that took the long road."""
    from norm_plugin.kernels.launch import Launch

    seen: list[Any] = []
    original = Launch.through_jit

    def spied(self: Any, *args: Any) -> None:
        seen.append(self)
        original(self, *args)

    monkeypatch.setattr(Launch, "through_jit", spied)
    return seen


def call(x: Tensor, weight: Tensor | None = None, **how: Any) -> Tensor:
    return norm_plugin.rmsnorm(x, weight, **how)


# --- which road ---------------------------------------------------------------------------------------------------


def test_the_second_call_of_a_signature_takes_the_short_road(through_triton: list[Any]) -> None:
    x, weight = TRITON.make("normal", (4, 80), BF16), TRITON.weights(80, BF16)
    first = call(x, weight)
    assert twins.same_bits(call(x, weight), first)
    assert twins.same_bits(call(x[:2], weight), first[:2])
    assert len(through_triton) == (1 if COMPILED else 3)
    assert {launch.direct_reason for launch in through_triton} == ({""} if COMPILED else {ONLY_CUDA})


ONLY_CUDA = "only the CUDA driver is called directly"


@on_a_gpu
def test_an_address_that_is_not_aligned_takes_the_long_road(through_triton: list[Any]) -> None:
    x = TRITON.make("normal", (4, 80), BF16)
    moved = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(4, 80)
    expected = [call(x) for _ in range(2)]
    assert len(through_triton) == 1
    assert twins.same_bits(call(moved), expected[0])
    assert len(through_triton) == 2
    assert twins.same_bits(call(x), expected[0])
    assert len(through_triton) == 2


@on_a_gpu
def test_a_hook_sees_every_launch() -> None:
    """Profilers look at Triton's launches, so Triton does all launches while one looks."""
    from triton import knobs

    hook = knobs.runtime.launch_enter_hook
    if not hasattr(hook, "add"):
        pytest.skip("this Triton has no chain of hooks")
    x, seen = TRITON.make("normal", (4, 80), BF16), []
    expected = [call(x) for _ in range(2)]

    def look(*args: Any, **kwargs: Any) -> None:
        seen.append(args)

    hook.add(look)
    try:
        assert twins.same_bits(call(x), expected[0])
    finally:
        hook.remove(look)
    assert len(seen) == 1
    call(x)
    assert len(seen) == 1


def test_a_kernel_that_the_driver_does_not_know_goes_through_triton(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reason is said once for all signatures, and the results are right. In the interpreter, launches are told
    that they are on CUDA: its kernels have no function handle, as those of a Triton to come might have none."""
    from norm_plugin.kernels import driver
    from norm_plugin.kernels.launch import Launch

    dispatch.log_once.cache_clear()
    if COMPILED:

        def refuse(*args: Any) -> None:
            raise driver.Unsupported("this Triton's compiled kernels have no function handle or no metadata")

        monkeypatch.setattr(driver, "launcher", refuse)
    else:
        made = Launch.__init__

        def on_cuda(self: Any, *args: Any, **kwargs: Any) -> None:
            made(self, *args, **kwargs)
            self.direct_reason = ""

        monkeypatch.setattr(Launch, "__init__", on_cuda)
    for width in (48, 80):
        a = TRITON.arguments(OPS["rmsnorm"], (4, width), BF16)
        for _ in range(2):
            TRITON.outputs(OPS["rmsnorm"], a)  # which compares with the native twin
    messages = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    (message,) = messages
    assert message.startswith(
        "kernels are launched by Triton itself, which takes longer: this Triton's compiled kernels"
    )


# --- arguments ----------------------------------------------------------------------------------------------------


def test_a_report_names_the_configuration_of_a_kernel_that_has_not_run_yet() -> None:
    """A report is written when a call finds its kernel, and nothing changes in it until there is another."""
    from norm_plugin.engines import implementations

    said: list[str] = []

    def tell() -> None:
        said.extend(e["configuration"] for e in implementations.find("rmsnorm", [("bfloat16", 96, (96, 1))]))

    end = dispatch.on_resolve(tell)
    try:
        x = torch.randn(2, 96, device=DEVICE, dtype=BF16)
        norm_plugin.rmsnorm(x, x[0])
        tell()
    finally:
        end()
    before, *_, after = said
    assert before == after
    assert "warps" in before


def test_eps_may_be_an_integer() -> None:
    """Triton would make it an integer in the kernel, and would make a 1 a constant."""
    x = TRITON.make("normal", (4, 80), BF16)
    for eps in (0, 1, 2):
        dispatch.reset()
        found = [call(x, eps=eps) for _ in range(3)]
        dispatch.reset()
        expected = call(x, eps=float(eps))
        assert all(twins.same_bits(one, expected) for one in found)


def test_every_eps_is_its_own(through_triton: list[Any]) -> None:
    x = TRITON.make("normal", (4, 80), torch.float32)
    for _ in range(2):
        for eps in (1e-6, 1e-5, 1.0):
            torch.testing.assert_close(call(x, eps=eps), torch.nn.functional.rms_norm(x, (80,), None, eps))


def test_more_rows_than_a_kernel_counts_are_refused_before_anything_runs(through_triton: list[Any]) -> None:
    """On both roads: 2^31 rows of one element fit the memory of a GPU."""
    from norm_plugin.kernels.launch import MOST_ROWS
    from norm_plugin.kernels.rms import bind
    from norm_plugin.numerics import NUMERICS

    x = TRITON.make("normal", (4, 1), BF16)
    launch = bind(x, None, None, x.clone(), None, NUMERICS["fp32"])
    for _ in range(2):
        with pytest.raises(ValueError, match=f"the input has {2**31} rows, and a kernel counts at most {MOST_ROWS}"):
            launch(2**31, 1e-6, x, None, None, x, None, None, None)
        before = len(through_triton)
        launch(4, 1e-6, x, None, None, x.clone(), None, None, None)
    assert before == len(through_triton) - (0 if COMPILED else 1)


def test_no_rows_launch_nothing(through_triton: list[Any]) -> None:
    assert call(TRITON.make("normal", (4, 80), BF16)[:0]).shape == (0, 80)
    assert through_triton == []


@pytest.mark.parametrize("pdl", [None, True, False])
def test_a_call_may_say_whether_it_is_launched_dependently(pdl: bool | None, through_triton: list[Any]) -> None:
    """If the call says nothing, the flag decides. A GPU that cannot is never asked to."""
    from norm_plugin.kernels.launch import has_pdl

    x = TRITON.make("normal", (4, 80), BF16)
    expected = call(x, enable_pdl=False)
    for flag in (None, True, False):
        with settings.override(pdl=flag):
            through_triton.clear()
            for _ in range(2):
                assert twins.same_bits(call(x, enable_pdl=pdl), expected)
            wanted = pdl if pdl is not None else flag is not False
            assert {launch.pdl for launch in through_triton} == {wanted and has_pdl(DEVICE)}


# --- threads and memory -------------------------------------------------------------------------------------------


@on_a_gpu
@pytest.mark.parametrize("streams", [False, True], ids=["one stream", "a stream each"])
def test_threads_launch_one_signature_at_once(streams: bool) -> None:
    """Each thread has its own rows, number of rows, output and stream, so another thread's argument would show."""
    weight, wrong, failed = TRITON.weights(1024, BF16), torch.zeros(8, device=DEVICE, dtype=torch.int64), []
    call(TRITON.make("normal", (4, 1024), BF16), weight, out=TRITON.make("normal", (4, 1024), BF16))

    def work(number: int) -> None:
        try:
            x = TRITON.make("normal", (number + 1, 1024), BF16, number)
            out = torch.empty_like(x)
            expected = call(x, weight)
            torch.cuda.synchronize()
            with torch.cuda.stream(torch.cuda.Stream() if streams else torch.cuda.default_stream()):
                for _ in range(1000):
                    call(x, weight, out=out)
                    wrong[number] += (out.view(torch.int16) != expected.view(torch.int16)).sum()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    assert failed == []
    assert wrong.tolist() == [0] * 8


def allocated(run: Callable[[], Any]) -> tuple[int, int]:
    """(number, bytes) of what a call allocates on the GPU, its result kept."""
    run()
    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()
    result = run()
    after = torch.cuda.memory_stats()
    keys = ("allocation.all.allocated", "allocated_bytes.all.allocated")
    del result
    return after[keys[0]] - before[keys[0]], after[keys[1]] - before[keys[1]]


def in_blocks(*tensors: Tensor) -> int:
    """The bytes that the allocator takes for tensors: multiples of 512."""
    return sum(-(-t.numel() * t.element_size() // 512) * 512 for t in tensors)


@on_a_gpu
@pytest.mark.parametrize("name", [name for name in OPS if name != "layernorm_linear"])
def test_a_call_allocates_its_outputs_and_nothing_else(name: str) -> None:
    """Of heads of a fused projection, which lie where they lie; ops that write what they are given allocate nothing."""
    op = OPS[name]
    a = TRITON.arguments(op, (64, 12, 128), BF16)
    wide = [key for key in samples.alike(op) if a[key] is not None and a[key].shape[-1] > 1]  # not one number a row
    a |= {key: layouts.qkv_slice(a[key]) for key in wide}
    returned = dispatch.call(op, *a.values())
    outputs = () if returned is None else (returned,) if isinstance(returned, Tensor) else returned
    for door in (lambda: dispatch.call(op, *a.values()), lambda: getattr(torch.ops.norm_plugin, name)(*a.values())):
        assert allocated(door) == (len(outputs), in_blocks(*outputs))
    assert dispatch.calls(name, "native") == 0


@on_a_gpu
def test_the_public_functions_allocate_no_more() -> None:
    x, residual, weight = (TRITON.make("normal", (64, 1024), BF16, seed) for seed in (1, 2, 3))
    out, weight = torch.empty_like(x), weight[0].clone()
    assert allocated(lambda: norm_plugin.rmsnorm(x, weight)) == (1, in_blocks(x))
    assert allocated(lambda: norm_plugin.rmsnorm(x, weight, out=out)) == (0, 0)
    assert allocated(lambda: norm_plugin.fused_add_rmsnorm(x, residual, weight)) == (0, 0)
    assert allocated(lambda: norm_plugin.layernorm(x, weight, weight)) == (1, in_blocks(x))
    assert allocated(lambda: norm_plugin.rmsnorm_fn(x, weight, None, residual)) == (1, in_blocks(x))
