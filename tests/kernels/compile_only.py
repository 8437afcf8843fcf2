"""Compile the kernels for GPUs that are not here, and print what their machine code is like, as JSON.

    python tests/kernels/compile_only.py [--few]

Any Python with triton and torch will do; no GPU, no pytest. Every launch is bound as for a call, with the constants and
arguments that the call would have; only at its end the kernel is compiled, and not run. test_compile_only says what the
reports must be like. --few leaves out what does not depend on Triton's version.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from norm_plugin import kernels
from norm_plugin.accuracy import inputs
from norm_plugin.kernels import backward, binding, driver, gated, launch, rms
from tests.kernels import ptx
from tests.kernels.compile_tasks import ARCHITECTURES, EVERY_OP, FAR, TYPES, Task, tasks
from tests.spec import layouts, samples

PROCESSORS = 132


@dataclass
class Report:
    """What became of a task. An access is [store, its parameter's name, bytes at once, before the wait]; `shares` says
    for each parameter how many bytes of a chunk a thread has."""

    label: str
    name: str
    arch: int
    width: int
    error: str = ""
    pdl: bool = False
    waits: int = 0
    accesses: list[tuple[bool, str, int, bool]] = field(default_factory=list)
    shares: dict[str, int] = field(default_factory=dict)
    aligned: bool = False
    narrow: list[str] = field(default_factory=list)
    no_short_road: str = ""
    registers: int = 0
    stack: int = 0


@dataclass
class Bound:
    """A launch, and what it is given, where it would run."""

    bound: Any
    pointers: tuple[Tensor | None, ...]


def far(t: Tensor) -> Tensor:
    """Its rows far apart, without memory."""
    return torch.empty_strided(t.shape, (2**31 + 16, 1), dtype=t.dtype, device="meta")


def arguments(task: Task) -> samples.Arguments:
    """Those of a call, in the layout of the task."""
    op = EVERY_OP[task.name]
    a = samples.arguments(op, task.shape, task.dtype, **task.variant)
    for key in ("grad", "residual_grad"):
        if key in a and (key == "grad" or a[key] is not None):
            a[key] = inputs.make("normal", task.shape, task.dtype)
    laid = (layouts.LAYOUTS | {FAR: far})[task.layout]
    return a | {key: laid(a[key]) for key in samples.alike(op) if a[key] is not None}


def bind(task: Task) -> list[Bound]:
    """The launches of a task, bound by the code that binds them for a call; nothing runs."""
    op, a = EVERY_OP[task.name], arguments(task)
    pdl, fp8_unit = ARCHITECTURES[task.arch]
    launched: list[Bound] = []

    def launch_nothing(bound: Any, m: int, eps: float, *pointers: Tensor | None) -> None:
        launched.append(Bound(bound, pointers))

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(launch.KernelLaunch, "__call__", launch_nothing))
        for module in (binding, backward):
            stack.enter_context(mock.patch.object(module, "gpu_of", return_value=f"sm_{task.arch}"))
            stack.enter_context(mock.patch.object(module, "use_pdl", return_value=pdl))
        for module in (rms, gated):
            stack.enter_context(mock.patch.object(module, "has_fp8_unit", return_value=fp8_unit))
        stack.enter_context(mock.patch.object(backward, "on_nvidia", return_value=True))
        stack.enter_context(mock.patch.object(backward, "processors", return_value=PROCESSORS))
        found = kernels.find(op.kind, op.name)
        assert found is not None
        found(*a.values()).run(*a.values())
    assert launched, f"{task.label} launched nothing"
    return launched


def compiled(found: Bound, task: Task) -> tuple[Any, dict[str, Tensor | None]]:
    """(the compiled kernel, its parameters by name), specialised as Triton would for aligned addresses."""
    bound = found.bound
    values = bound.constants | ({"tile": bound.constants["tile"]._replace(with_row=False)} if task.lean else {})
    signature = dict.fromkeys(values, "constexpr")
    parameters: dict[str, Tensor | None] = {}
    aligned = {}
    for place, value in enumerate([*found.pointers, "i32", *bound.integers, "fp32"]):
        name = bound.kernel.arg_names[place]
        if value is None:
            signature[name], values[name] = "constexpr", None
        elif isinstance(value, Tensor):
            signature[name], parameters[name] = "*" + TYPES[value.dtype], value
            aligned[(place,)] = [["tt.divisibility", 16]]
        else:
            wide = not isinstance(value, str) and not -(2**31) <= value < 2**31
            signature[name], parameters[name] = "i64" if wide else value if isinstance(value, str) else "i32", None
    in_order = {name: signature[name] for name in bound.kernel.arg_names}
    source = ASTSource(bound.kernel, in_order, constexprs=values, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", task.arch, 32), options=bound.options), parameters


def short_road(found: Bound, kernel: Any, sizes: list[int]) -> str:
    """Why the kernel could not be launched through the CUDA driver, or ''. The driver is faked."""
    with (
        mock.patch.object(driver, "parameter_sizes", return_value=sizes),
        mock.patch.object(driver, "driver", return_value=SimpleNamespace(cuLaunchKernelEx=None)),
    ):
        found.bound.prepare_direct(SimpleNamespace(function=1, metadata=kernel.metadata), found.pointers)
    return "" if found.bound.direct is not None else str(found.bound.direct_reason)


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers a thread, bytes of stack a thread), which is where registers are spilled to."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text)
    assert found is not None, text
    return int(found[1]), int(found[2]) + int(found[3])


def reports(task: Task) -> list[Report]:
    """Compile what a task launches, and look at the results."""
    try:
        launches = bind(task)
    except Exception as error:  # whatever is raised is a finding, not the end
        return [Report(task.label, task.name, task.arch, task.shape[-1], f"{type(error).__name__}: {error}")]
    return [report(task, found) for found in launches]


def report(task: Task, found: Bound) -> Report:
    bound = found.bound
    made = Report(f"{task.label} {bound.kernel.__name__}", task.name, task.arch, task.shape[-1])
    try:
        kernel, parameters = compiled(found, task)
        names, text = list(parameters), kernel.asm["ptx"]
        if tile := bound.constants["tile"]._asdict() if "tile" in bound.constants else {}:
            share = tile["block"] * tile["rows"] // (bound.options["num_warps"] * 32)
            rows = {name: t for name, t in parameters.items() if t is not None and t.shape == task.shape}
            made.shares = {name: share * t.itemsize for name, t in rows.items()}
        made.aligned = tile.get("align") == 16
        made.pdl = bound.pdl
        made.waits = text.count("griddepcontrol.wait")
        made.accesses = [(a.store, names[a.parameter], a.bytes, a.before_wait) for a in ptx.accesses(text)]
        made.narrow = ptx.narrow_arithmetic(text)
        made.no_short_road = "" if task.layout == FAR else short_road(found, kernel, ptx.parameters(text))
        made.registers, made.stack = resources(kernel.asm["cubin"])
    except Exception as error:  # whatever a compiler raises is a finding, not the end
        made.error = f"{type(error).__name__}: {error}; {error.__cause__}"
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--few", action="store_true", help="one variant of each op, and two widths")
    wanted, found = list(tasks(parser.parse_args().few)), []
    processes = min(8, os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as cache, mock.patch.dict(os.environ, TRITON_CACHE_DIR=cache):
        for arch in ARCHITECTURES:  # in processes of its own: Triton 3.6 converts to fp8 as on the first that it meets
            of_arch = [task for task in wanted if task.arch == arch]
            with multiprocessing.get_context("fork").Pool(processes) as pool:
                found += [made for of_task in pool.map(reports, of_arch, chunksize=4) for made in of_task]
    print(json.dumps({"triton": triton.__version__, "reports": [asdict(made) for made in found]}))


if __name__ == "__main__":
    main()
