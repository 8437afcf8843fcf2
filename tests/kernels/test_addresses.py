"""A recognised call that writes is launched by the addresses that the shortcut has read, in the order of the kernel's
pointers; whatever forbids the short launch of other calls forbids this one.

Where there is no GPU, the driver is a fake that keeps what it is given; everything else is what a GPU runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import norm_plugin
from norm_plugin import dispatch, shortcut
from norm_plugin.kernels import launch as launching
from tests.kernels.device import COMPILED, DEVICE
from tests.kernels.twins import TRITON

BF16 = torch.bfloat16
WIDTH = 64

pytestmark = [
    pytest.mark.skipif(COMPILED, reason="the real driver cannot be asked what it was given"),
    pytest.mark.skipif(shortcut.dynamo_guards is None, reason="this torch has no guards"),
]


def aligned(*shape: int, by: int = 0) -> Tensor:
    """A tensor that begins so many bytes behind a multiple of 16."""
    base = torch.ones(32 + torch.Size(shape).numel(), dtype=BF16, device=DEVICE)
    first = -base.data_ptr() % launching.VECTOR_BYTES // 2 + by // 2
    return base[first : first + torch.Size(shape).numel()].view(shape)


def out_of(x: Tensor, other: Tensor, weight: Tensor | None) -> tuple[Tensor, ...]:
    norm_plugin.rmsnorm(x, weight, 1e-5, out=other)
    return (x, other) if weight is None else (x, weight, other)


def fused_add(x: Tensor, other: Tensor, weight: Tensor | None) -> tuple[Tensor, ...]:
    norm_plugin.fused_add_rmsnorm(x, other, weight, 1e-5)
    return (x, other) if weight is None else (x, other, weight)


#: Each makes a call, and says in which order its kernel has the tensors as pointers.
CALLS: dict[str, Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, ...]]] = {
    "rmsnorm_out": out_of,
    "fused_add_rmsnorm": fused_add,
}


class Roads:
    """What the driver was given, how many launches were Triton's, and how often a launch read addresses itself."""

    def __init__(self) -> None:
        self.direct: list[tuple[int, float, list[int]]] = []
        self.through_jit = self.read = 0


@pytest.fixture
def roads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Roads]:
    """The launches from the second call of a signature on, on a GPU that is number None."""
    seen = Roads()
    jit = launching.Launch.through_jit

    def counted(self: Any, m: int, eps: float, pointers: Any) -> None:
        seen.through_jit += 1
        jit(self, m, eps, pointers)
        given = [i for i, p in enumerate(pointers) if p is not None and i not in self.in_place]

        def different(pointers: Any) -> list[Tensor]:
            seen.read += 1
            return [pointers[i] for i in given]

        self.different = different
        self.direct = lambda stream, m, eps, addresses: seen.direct.append((m, eps, list(addresses)))

    monkeypatch.setattr(launching.Launch, "through_jit", counted)
    monkeypatch.setattr(launching, "current_device", lambda: None)
    monkeypatch.setattr(launching, "raw_stream", lambda index: 0)
    yield seen
    dispatch.reset()


@pytest.mark.parametrize("with_weight", [True, False], ids=["weight", "no weight"])
@pytest.mark.parametrize("name", CALLS)
def test_the_driver_gets_the_addresses_of_this_call(name: str, with_weight: bool, roads: Roads) -> None:
    weight = aligned(WIDTH) if with_weight else None
    CALLS[name](aligned(4, WIDTH), aligned(4, WIDTH), weight)
    expected, kept = [], []
    for rows in (4, 1, 9):
        x, other = aligned(rows, WIDTH), aligned(rows, WIDTH)
        pointers = CALLS[name](x, other, weight)
        kept.append(pointers)  # so that no address is used again
        expected.append((rows, 1e-5, [t.data_ptr() for t in pointers]))
    assert roads.direct == expected
    assert (roads.through_jit, roads.read) == (1, 0)
    assert dispatch.calls(name, "triton") == 4


def test_out_that_is_the_input_is_one_address_twice(roads: Roads) -> None:
    x, weight = aligned(4, WIDTH), aligned(WIDTH)
    out_of(x, aligned(4, WIDTH), weight)
    out_of(x, x, weight)
    assert roads.direct == [(4, 1e-5, [x.data_ptr(), weight.data_ptr(), x.data_ptr()])]


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("name", CALLS)
def test_an_address_that_is_not_aligned_goes_to_triton(name: str, which: int, roads: Roads) -> None:
    CALLS[name](aligned(4, WIDTH), aligned(4, WIDTH), aligned(WIDTH))
    offsets = [8 if i == which else 0 for i in range(3)]
    x, other, weight = aligned(4, WIDTH, by=offsets[0]), aligned(4, WIDTH, by=offsets[1]), aligned(WIDTH, by=offsets[2])
    CALLS[name](x, other, weight)
    assert (roads.direct, roads.through_jit) == ([], 2)


@pytest.mark.parametrize("name", CALLS)
def test_no_rows_launch_nothing_and_are_a_call(name: str, roads: Roads) -> None:
    CALLS[name](aligned(4, WIDTH), aligned(4, WIDTH), aligned(WIDTH))
    CALLS[name](aligned(0, WIDTH), aligned(0, WIDTH), aligned(WIDTH))
    assert (roads.direct, roads.through_jit) == ([], 1)
    assert dispatch.calls(name, "triton") == 2


@pytest.mark.parametrize("name", CALLS)
def test_another_current_device_goes_to_triton(name: str, roads: Roads, monkeypatch: pytest.MonkeyPatch) -> None:
    CALLS[name](aligned(4, WIDTH), aligned(4, WIDTH), aligned(WIDTH))
    monkeypatch.setattr(launching, "current_device", lambda: 1)
    CALLS[name](aligned(4, WIDTH), aligned(4, WIDTH), aligned(WIDTH))
    assert (roads.direct, roads.through_jit) == ([], 2)


#: Ways in which a profiler asks for Triton's launches.
HOOKS: dict[str, Callable[[pytest.MonkeyPatch, Any], None]] = {
    "added to the chain": lambda patch, knobs: patch.setattr(knobs.runtime.launch_enter_hook, "calls", [print]),
    "a function in its place": lambda patch, knobs: patch.setattr(knobs.runtime, "launch_enter_hook", lambda *_: None),
}


@pytest.mark.parametrize("how", HOOKS)
@pytest.mark.parametrize("name", CALLS)
def test_a_hook_is_noticed_at_any_call(name: str, how: str, roads: Roads) -> None:
    from triton import knobs

    def call() -> None:
        CALLS[name](aligned(4, WIDTH), aligned(4, WIDTH), aligned(WIDTH))

    call()
    for _ in range(2):
        before = (len(roads.direct), roads.through_jit)
        call()
        assert (len(roads.direct), roads.through_jit) == (before[0] + 1, before[1])
        with pytest.MonkeyPatch.context() as patch:
            HOOKS[how](patch, knobs)
            call()
        assert (len(roads.direct), roads.through_jit) == (before[0] + 1, before[1] + 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knobs.runtime, "launch_enter_hook", None)  # no hooks at all
        call()
    assert (len(roads.direct), roads.through_jit) == (3, 3)


@pytest.mark.parametrize("name", CALLS)
def test_what_is_written_is_known_to_be_before_the_launch(name: str, roads: Roads) -> None:
    x, other, weight = aligned(4, WIDTH), aligned(4, WIDTH), aligned(WIDTH)
    CALLS[name](x, other, weight)
    before = [t._version for t in (x, other, weight)]
    CALLS[name](x, other, weight)
    after = [t._version for t in (x, other, weight)]
    assert [b - a for a, b in zip(before, after, strict=True)] == [name == "fused_add_rmsnorm", 1, 0]
    assert len(roads.direct) == 1


@pytest.mark.parametrize("name", CALLS)
def test_a_driver_that_fails_raises_and_nothing_computes_again(name: str, roads: Roads) -> None:
    x, other, weight = TRITON.make("normal", (4, WIDTH), BF16), aligned(4, WIDTH), aligned(WIDTH)
    x = aligned(4, WIDTH).copy_(x)
    CALLS[name](x, other, weight)
    (route,) = (route for route in dispatch.routes() if route.op.name == name)
    assert route.bound is not None
    (launch,) = route.bound.launches

    def dies(*_: Any) -> None:
        raise RuntimeError("cuLaunchKernelEx failed with CUDA error 719")

    launch.direct = dies
    kept = x.clone(), other.clone()
    with pytest.raises(RuntimeError, match="CUDA error 719"):
        CALLS[name](x, other, weight)
    assert torch.equal(x, kept[0])
    assert torch.equal(other, kept[1])
    assert {r.backend for r in dispatch.routes()} == {"triton"}
