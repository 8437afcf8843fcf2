"""Launches kernels with little host time, through the CUDA driver; Triton's JIT launches the rest.

At every launch the JIT binds, specialises and looks up its arguments. All of that follows from the signature, so here
it is done once, and later calls hand the driver plain pointers (see `driver`). Calls that the compiled kernel was not
specialised for (a pointer off its 16-byte alignment, a stride beyond 32 bits, another device) go through the JIT.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from triton import knobs

from norm_plugin import settings
from norm_plugin.dispatch import log_once
from norm_plugin.kernels import NotLaunched, driver, interpreted
from norm_plugin.kernels.configs import Config
from norm_plugin.kernels.constants import Tile

VECTOR_BYTES = 16
DIRECT_LIMIT = 2**31
MOST_ROWS = 2**31 - 64  # 32 bits, which also count the missing rows of the last program

#: For a kernel that writes nothing in place.
NOTHING: Mapping[int, int] = {}

_address: Callable[[Tensor], int] = Tensor.data_ptr
current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
raw_stream: Callable[[int], int] = getattr(
    torch._C, "_cuda_getCurrentRawStream", lambda index: torch.cuda.current_stream(index).cuda_stream
)


def has_pdl(device: torch.device) -> bool:
    """Whether a kernel on `device` may start before its predecessor has finished (Hopper and later)."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def has_fp8_unit(device: torch.device) -> bool:
    """Whether a GPU converts to both fp8 formats in one instruction that saturates (Ada, Hopper and later)."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)


def use_pdl(asked: bool | None, device: torch.device) -> bool:
    """Whether to launch dependently: as the call asks, else as the flag says; never on a GPU that cannot."""
    wanted = settings.get().pdl if asked is None else asked
    return wanted is not False and has_pdl(device)


def gpu_of(device: torch.device) -> str:
    """The name under which configs.json has a table for a GPU."""
    if device.type != "cuda":
        return "default"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def hooked() -> bool:
    """Whether a hook (of a profiler) wants to see launches: then Triton must do them."""
    hook: Any = knobs.runtime.launch_enter_hook
    try:  # costs less than getattr with a default
        return bool(hook.calls)
    except AttributeError:  # None, or one function instead of a chain of them
        return hook is not None


#: All threads of Triton's interpreter share one grid, so they take turns.
_one_at_a_time = threading.RLock()


@cache
def processors(device: torch.device) -> int:
    """The number of multiprocessors; on a CPU 2, so that the tests' batches are large ones."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


class KernelLaunch:
    """A kernel for one signature: only the pointers, the number of rows and eps change from call to call.

    `integers` say where the rows lie. `in_place` maps a pointer to the one that it always equals.
    """

    def __init__(
        self,
        kernel: Any,
        warps: int,
        integers: tuple[int | None, ...],
        device: torch.device,
        pdl: bool,
        constants: dict[str, Any],
        programs: driver.Programs,
        registers: int | None = None,
        in_place: Mapping[int, int] = NOTHING,
    ) -> None:
        self.kernel, self.warps, self.device, self.pdl, self.programs = kernel, warps, device, pdl, programs
        self.integers, self.constants, self.in_place = integers, constants, in_place
        self.options: dict[str, Any] = {"num_warps": warps, "enable_fp_fusion": True}
        if pdl:
            self.options["launch_pdl"] = True
        if registers is not None:
            self.options["maxnreg"] = registers
        self.lean: KernelLaunch | None = None
        self.lean_from = MOST_ROWS + 1
        self.compiled: set[tuple[bool, ...]] = set()  # which pointers were aligned when Triton compiled
        self.direct: driver.Launcher | None = None
        self.different: Callable[[Sequence[Tensor | None]], Sequence[Any]] = tuple  # each tensor once
        self.direct_reason = ""
        self.index = device.index
        if device.type != "cuda" or torch.version.hip is not None:
            self.direct_reason = "only the CUDA driver is called directly"
        elif any(s is not None and not -DIRECT_LIMIT <= s < DIRECT_LIMIT for s in self.integers):
            self.direct_reason = "a stride takes more than 32 bits"

    def __call__(self, m: int, eps: float, *pointers: Tensor | None) -> None:
        if self.direct is not None and self.at(m, eps, list(map(_address, self.different(pointers)))):
            return
        if 0 < m < self.lean_from:
            self.through_jit(m, eps, pointers)
        else:
            self.of_many_rows(m, eps, pointers)

    def at(self, m: int, eps: float, addresses: Sequence[int]) -> bool:
        """Launches through the driver, with each address once, in the kernel's order. Returns False if it cannot."""
        direct = self.direct
        if direct is None or not 0 < m < self.lean_from or current_device() != self.index or hooked():
            return False
        for address in addresses:
            if address % VECTOR_BYTES:
                return False
        direct(raw_stream(self.index), m, eps, addresses)
        return True

    def of_many_rows(self, m: int, eps: float, pointers: Sequence[Tensor | None]) -> None:
        """Handles zero rows, too many rows, and batches for the lean launch."""
        if m > MOST_ROWS:
            raise ValueError(f"the input has {m} rows, and a kernel counts at most {MOST_ROWS}; split it.")
        if m > 0 and self.lean is not None:
            try:
                self.lean(m, eps, *pointers)
            except NotLaunched as failure:
                log_once(f"large batches are launched as small ones, which takes longer: {failure}")
                self.lean_from = MOST_ROWS + 1
                self(m, eps, *pointers)

    def through_jit(self, m: int, eps: float, pointers: Sequence[Tensor | None]) -> None:
        """Triton's own launch, which specialises for any arguments. All that can fail happens before it."""
        aligned = tuple(p is None or p.data_ptr() % VECTOR_BYTES == 0 for p in pointers)
        arguments, named = (*pointers, m, *self.integers, float(eps)), self.constants | self.options
        grid = (self.programs(m),)
        with self.current(), _one_at_a_time if interpreted() else nullcontext():
            if aligned not in self.compiled:
                self.compile(grid, arguments, named, all(aligned))
                self.compiled.add(aligned)
            self.kernel[grid](*arguments, **named)

    def current(self) -> AbstractContextManager[None]:
        """Makes the device of the tensors the current one."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def compile(self, grid: tuple[int], arguments: tuple[Any, ...], named: dict[str, Any], aligned: bool) -> None:
        """Compiles and loads the kernel for these arguments, or raises NotLaunched. If all pointers are aligned, the
        driver launches it from now on."""
        try:
            compiled = self.kernel.warmup(*arguments, grid=grid, **named)
            if compiled is not None:  # the interpreter compiles nothing
                compiled.run  # noqa: B018 - loads it onto the device
            if aligned and self.direct is None and not self.direct_reason:
                self.prepare_direct(compiled, arguments)
        except (MemoryError, RecursionError):
            raise
        except Exception as error:
            raise NotLaunched(f"{type(error).__name__}: {error}") from error

    def prepare_direct(self, compiled: Any, arguments: tuple[Any, ...]) -> None:
        """Prepares launches through the driver, or keeps the reason why there can be none."""
        given = [i for i, p in enumerate(arguments) if isinstance(p, Tensor)]
        different = [i for i in given if i not in self.in_place]
        slots = [different.index(self.in_place.get(i, i)) for i in given]
        integers = tuple(i for i in self.integers if i is not None)
        try:
            direct = driver.launcher(compiled, slots, integers, self.programs, self.warps * 32, self.pdl)
        except driver.Unsupported as reason:
            self.direct_reason = str(reason)
            log_once(f"kernels are launched by Triton itself, which takes longer: {reason}")
        else:
            self.different = itemgetter(*different)  # a tuple, because every kernel has at least two tensors
            self.direct = direct


class Launch(KernelLaunch):
    """A kernel whose programs take a few rows each, as the table's entry says.

    A large batch goes to the `lean` launch: the same kernel, which reads its weights only when it needs them.
    """

    def __init__(
        self, kernel: Any, config: Config, integers: tuple[int | None, ...], device: torch.device, tile: Tile,
        recipe: Any, in_place: Mapping[int, int] = NOTHING,
    ) -> None:  # fmt: skip
        self.config, rows = config, config.rows
        super().__init__(
            kernel, config.warps, integers, device, bool(tile.pdl), {"tile": tile, "recipe": recipe},
            lambda m: -(-m // rows), in_place=in_place,
        )  # fmt: skip
        if config.lean and tile.with_row:
            lean = tile._replace(with_row=False)
            self.lean = Launch(kernel, config, integers, device, lean, recipe, in_place)
            self.lean_from = processors(device) * config.lean * rows
