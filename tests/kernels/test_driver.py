"""The launch through the CUDA driver: what the driver gets, and when this road is not taken.

Without a GPU the driver is a fake: a Python object that describes a kernel's parameters as it is told to, and keeps the
launches that it gets. Then nothing runs; test_launch shows that the real driver launches the same.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from norm_plugin.kernels import driver

pytestmark = pytest.mark.without_kernels

INTEGERS = (7, -3, 2**31 - 1, -(2**31))
POINTERS = 3
SIZES = [8] * POINTERS + [4] * (1 + len(INTEGERS) + 1) + [8, 8]


class Seen(NamedTuple):
    """One launch, as the driver reads it."""

    function: int
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    stream: int | None
    attributes: list[tuple[int, int]]
    values: list[int | float]


class FakeDriver:
    """The two entry points that are called."""

    def __init__(self, sizes: list[int] | None = None, status: int = 0) -> None:
        self.sizes, self.status = SIZES if sizes is None else sizes, status
        self.seen: list[Seen] = []
        self.meanwhile: Callable[[], None] = lambda: None

    def cuFuncGetParamInfo(self, function: Any, index: Any, offset: Any, size: Any) -> int:
        if index.value >= len(self.sizes):
            return 1
        size._obj.value = self.sizes[index.value]
        return 0

    def cuLaunchKernelEx(self, config: Any, function: Any, places: Any, extra: None) -> int:
        self.meanwhile()
        c = config._obj
        kinds = [ctypes.c_uint64] * POINTERS + [ctypes.c_int32] * (1 + len(INTEGERS)) + [ctypes.c_float]
        kinds += [ctypes.c_uint64] * 2
        values = [kind.from_address(place).value for kind, place in zip(kinds, places, strict=True)]
        attributes = [(c.attributes[i].id, c.attributes[i].value) for i in range(c.attribute_count)]
        grid, block = (c.grid_x, c.grid_y, c.grid_z), (c.block_x, c.block_y, c.block_z)
        self.seen.append(Seen(function.value, grid, block, c.shared, c.stream, attributes, values))
        return self.status


KERNEL = SimpleNamespace(function=4711, metadata=SimpleNamespace(shared=1024))


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[FakeDriver], FakeDriver]:
    def install(fake: FakeDriver) -> FakeDriver:
        monkeypatch.setattr(driver, "driver", lambda: fake)
        return fake

    return install


def launcher(pdl: bool = False, rows: int = 4) -> driver.Launcher:
    return driver.launcher(KERNEL, range(POINTERS), INTEGERS, lambda m: -(-m // rows), 128, pdl)


def test_the_structures_have_the_sizes_of_cuda_h() -> None:
    """CUlaunchAttribute is an id, padding to 8 bytes and a union of 64; CUlaunchConfig ends in pointer and count."""
    assert ctypes.sizeof(driver.Attribute) == 72
    assert driver.Attribute.value.offset == 8
    assert ctypes.sizeof(driver.LaunchConfig) == 56
    assert (driver.LaunchConfig.stream.offset, driver.LaunchConfig.attributes.offset) == (32, 40)


@pytest.mark.parametrize("pdl", [True, False], ids=["dependent", "plain"])
def test_the_driver_gets_every_argument_in_its_place(install: Any, pdl: bool) -> None:
    fake = install(FakeDriver())
    launcher(pdl)(99, 9, 1e-6, [16, 2**63, 2**64 - 16])
    (seen,) = fake.seen
    assert (seen.function, seen.grid, seen.block, seen.shared) == (4711, (3, 1, 1), (128, 1, 1), 1024)
    assert seen.stream == 99
    assert seen.attributes == ([(driver.PDL_ATTRIBUTE, 1)] if pdl else [])
    assert seen.values == [16, 2**63, 2**64 - 16, 9, *INTEGERS, pytest.approx(1e-6), 0, 0]


def test_what_changes_from_launch_to_launch_is_packed_anew(install: Any) -> None:
    """Each of stream, rows, eps and addresses alone, and back again."""
    fake, launch = install(FakeDriver()), launcher()
    calls = [(0, 4, 0.5, 16), (5, 4, 0.5, 16), (5, 8, 0.5, 16), (5, 8, 0.25, 16), (5, 8, 0.25, 32), (0, 4, 0.5, 16)]
    for stream, m, eps, address in calls:
        launch(stream, m, eps, [address] * POINTERS)
    for (stream, m, eps, address), seen in zip(calls, fake.seen, strict=True):
        assert (seen.stream or 0, seen.grid[0]) == (stream, m // 4)
        assert (seen.values[0], seen.values[POINTERS], seen.values[-3]) == (address, m, eps)


def test_threads_do_not_mix_their_arguments(install: Any) -> None:
    """The fake lets other threads run in the middle of a launch. The real call holds the GIL and does not."""
    fake, launch = install(FakeDriver()), launcher(rows=1)
    fake.meanwhile = lambda: time.sleep(0.001)

    def work(number: int) -> None:
        for _ in range(20):
            launch(number, number, float(number), [16 * number] * POINTERS)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fake.seen) == 160
    for seen in fake.seen:
        number = seen.stream
        assert (seen.grid[0], seen.values[0], seen.values[POINTERS], seen.values[-3]) == (
            number,
            16 * number,
            number,
            number,
        )


def test_a_failed_launch_says_so(install: Any) -> None:
    install(FakeDriver(status=719))
    with pytest.raises(RuntimeError, match="cuLaunchKernelEx failed with CUDA error 719"):
        launcher()(0, 1, 1e-6, [16] * POINTERS)


@pytest.mark.parametrize(
    ("kernel", "sizes", "reason"),
    [
        (None, SIZES, "no function handle or no metadata"),
        (SimpleNamespace(function=1), SIZES, "no function handle or no metadata"),
        (SimpleNamespace(function="1", metadata=KERNEL.metadata), SIZES, "no function handle or no metadata"),
        (KERNEL, SIZES[:-1], r"take \[8, .*\] bytes, not \[8, "),
        (KERNEL, [8, *SIZES[:-1]], "bytes, not"),
        (KERNEL, [], r"take \[\] bytes"),
        (
            SimpleNamespace(function=1, metadata=SimpleNamespace(shared=0, global_scratch_size=8)),
            SIZES,
            "scratch memory",
        ),
        (
            SimpleNamespace(function=1, metadata=SimpleNamespace(shared=0, profile_scratch_size=8)),
            SIZES,
            "scratch memory",
        ),
    ],
    ids=["nothing", "no metadata", "a handle of another kind", "fewer", "others", "none", "scratch", "profile"],
)
def test_a_kernel_of_another_kind_is_refused(install: Any, kernel: Any, sizes: list[int], reason: str) -> None:
    install(FakeDriver(sizes))
    with pytest.raises(driver.Unsupported, match=reason):
        driver.launcher(kernel, range(POINTERS), INTEGERS, lambda m: m, 32, False)


@pytest.mark.parametrize("library", [None, SimpleNamespace(cuLaunchKernelEx=print)], ids=["missing", "old"])
def test_a_driver_without_the_entry_points_is_refused(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> Any:
        if library is None:
            raise OSError("libcuda.so.1: cannot open shared object file")
        return library

    monkeypatch.setattr(ctypes, "PyDLL", load)
    driver.driver.cache_clear()
    try:
        with pytest.raises(driver.Unsupported, match="the CUDA driver lacks an entry point"):
            launcher()
    finally:
        driver.driver.cache_clear()
