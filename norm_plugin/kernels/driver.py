"""Launches a compiled kernel through the CUDA driver, with arguments that are packed once.

Triton's launcher parses some forty arguments at each launch. Here they lie packed in memory, as the driver wants them.
A launch writes only the pointers (and the number of rows and eps, if they have changed) and calls cuLaunchKernelEx. If
the driver describes other parameters of the kernel (cuFuncGetParamInfo) than those that are packed, Triton launches it.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

PDL_ATTRIBUTE = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


class Attribute(ctypes.Structure):
    """CUlaunchAttribute: an id, and a union of 64 bytes of which PDL uses the first four."""

    _fields_ = (("id", ctypes.c_uint), ("pad", ctypes.c_uint), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60))


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid_x", ctypes.c_uint),
        ("grid_y", ctypes.c_uint),
        ("grid_z", ctypes.c_uint),
        ("block_x", ctypes.c_uint),
        ("block_y", ctypes.c_uint),
        ("block_z", ctypes.c_uint),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(Attribute)),
        ("attribute_count", ctypes.c_uint),
    )


class Unsupported(Exception):
    """This kernel cannot be launched this way; the message says why."""


@cache
def driver() -> Any:
    """The CUDA driver. Its calls keep the GIL, so that no other thread can repack the arguments meanwhile."""
    try:
        library = ctypes.PyDLL("libcuda.so.1")
        library.cuFuncGetParamInfo, library.cuLaunchKernelEx  # noqa: B018 - a driver before 12.4 lacks the first
    except (OSError, AttributeError) as error:
        raise Unsupported(f"the CUDA driver lacks an entry point: {error}") from error
    return library


def parameter_sizes(function: int) -> list[int]:
    """The sizes of the kernel's parameters in bytes, by the driver."""
    sizes: list[int] = []
    offset, size = ctypes.c_size_t(), ctypes.c_size_t()
    while True:
        where = (ctypes.c_void_p(function), ctypes.c_size_t(len(sizes)), ctypes.byref(offset), ctypes.byref(size))
        if driver().cuFuncGetParamInfo(*where) != 0:
            return sizes
        sizes.append(size.value)


Launcher = Callable[[int, int, float, Sequence[int]], None]


#: The number of programs for m rows.
Programs = Callable[[int], int]


def launcher(
    compiled: Any, slots: Sequence[int], integers: tuple[int, ...], programs: Programs, threads: int, pdl: bool
) -> Launcher:
    """Returns launch(stream, m, eps, addresses), for a kernel that takes pointers, m, `integers` and eps in this order.

    `slots` says which address each pointer takes: a tensor that is written in place is two pointers. Triton appends two
    scratch pointers, which these kernels do not use.
    """
    pointers = max(slots) + 1
    function, metadata = getattr(compiled, "function", None), getattr(compiled, "metadata", None)
    if not isinstance(function, int) or metadata is None:
        raise Unsupported("this Triton's compiled kernels have no function handle or no metadata")
    expected = [8] * len(slots) + [4] * (1 + len(integers) + 1) + [8, 8]
    found = parameter_sizes(function)
    if found != expected:
        raise Unsupported(f"the kernel's parameters take {found} bytes, not {expected}")
    if getattr(metadata, "global_scratch_size", 0) or getattr(metadata, "profile_scratch_size", 0):
        raise Unsupported("the kernel wants scratch memory")

    order = [*slots, pointers, *range(pointers + 2, pointers + 2 + len(integers)), pointers + 1]
    order += [pointers + 2 + len(integers)] * 2  # both scratch pointers are one zero
    m_at, integers_at = 8 * pointers, 8 * (pointers + 2)
    fill = struct.Struct(f"={pointers}Q").pack_into
    fill_m_and_eps = struct.Struct("=qf").pack_into
    call = driver().cuLaunchKernelEx

    def pack() -> list[Any]:
        values = ctypes.create_string_buffer(8 * len(expected))
        for i, integer in enumerate(integers):
            struct.pack_into("=q", values, integers_at + 8 * i, integer)
        base = ctypes.addressof(values)
        places = (ctypes.c_void_p * len(expected))(*[base + 8 * i for i in order])
        attribute = Attribute(PDL_ATTRIBUTE, 0, 1, b"")
        config = LaunchConfig(1, 1, 1, threads, 1, 1, metadata.shared, None, ctypes.pointer(attribute), int(pdl))
        arguments = (ctypes.byref(config), ctypes.c_void_p(function), places, None)
        return [partial(fill, values, 0), values, config, arguments, None]

    free = [pack()]  # each thread takes its own: another may run between packing and launching

    def launch(stream: int, m: int, eps: float, addresses: Sequence[int]) -> None:
        try:
            packed = free.pop()
        except IndexError:  # another thread holds it
            packed = pack()
        fill_addresses, values, config, arguments, last = packed
        fill_addresses(*addresses)
        now = (stream, m, eps)
        if now != last:
            fill_m_and_eps(values, m_at, m, eps)
            config.grid_x = programs(m)
            config.stream = stream
            packed[4] = now
        status = call(*arguments)
        free.append(packed)
        if status != 0:
            raise RuntimeError(f"cuLaunchKernelEx failed with CUDA error {status}")

    return launch
