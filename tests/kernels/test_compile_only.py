"""The machine code of the kernels for several GPUs, compiled by the installed, the oldest and the newest Triton.

Compiling needs no GPU. compile_only runs in another process, without the interpreter. scripts/test puts other Tritons
into .venv/triton-VERSION.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.without_kernels,
    pytest.mark.alone,  # these tests share one compilation
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]

ROOT = Path(__file__).parents[2]
HERE = "the one installed"
OTHERS = ["3.6.0", "3.9.0"]

#: The bytes that a thread may spill: two registers in a block quantisation, more in rows that hardly fit one program.
HELD_WIDTH, MOST_STACK, MOST_STACK_OF_BLOCKS, MOST_STACK_OF_WIDE_ROWS = 16384, 0, 8, 256


@cache
def compiled(version: str) -> list[dict[str, Any]]:
    """The reports of one Triton: of every task for the installed one, of few tasks for the others."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "tests/kernels/compile_only.py"]
    if version == HERE:
        version = importlib.metadata.version("triton")
    else:
        folder = ROOT / ".venv" / f"triton-{version}"
        if not folder.exists():
            pytest.skip(f"triton {version} is not in {folder.relative_to(ROOT)}: scripts/test puts it there")
        environment["PYTHONPATH"] = f"{folder}{os.pathsep}{ROOT}"
        command.append("--few")
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])  # ptxas may print errors before it
    assert found["triton"] == version
    reports: list[dict[str, Any]] = found["reports"]
    return reports


every_triton = pytest.mark.parametrize("version", [HERE, *OTHERS])


def labels(reports: list[dict[str, Any]]) -> list[str]:
    return [f"{report['label']}: {report}" for report in reports]


@every_triton
def test_every_kernel_compiles(version: str) -> None:
    from norm_plugin.gradients import BACKWARD_OPS
    from norm_plugin.ops import OPS

    reports = compiled(version)
    assert {report["name"] for report in reports} == {*OPS, *BACKWARD_OPS} - {"layernorm_linear"}
    assert {report["arch"] for report in reports} == {80, 90, 100}
    assert [f"{report['label']}: {report['error']}" for report in reports if report["error"]] == []


@every_triton
def test_nothing_is_read_or_written_before_the_wait(version: str) -> None:
    """Not even a weight, because the kernel before may write it."""
    reports = [report for report in compiled(version) if report["pdl"]]
    assert len(reports) > 30
    assert all(len(report["accesses"]) >= 2 for report in reports)
    assert labels([report for report in reports if any(early for *_, early in report["accesses"])]) == []


@every_triton
def test_launches_are_dependent_from_hopper_on(version: str) -> None:
    """Kernels for earlier GPUs have no such instruction, because it would not assemble."""
    for report in compiled(version):
        assert report["pdl"] == (report["arch"] >= 90), report["label"]
        assert report["waits"] == int(report["pdl"]), report["label"]


@every_triton
def test_all_arithmetic_is_in_fp32(version: str) -> None:
    assert labels([report for report in compiled(version) if report["narrow"]]) == []


@every_triton
def test_the_driver_could_launch_every_kernel(version: str) -> None:
    """Its parameters are those that the short road packs. The short road uses nothing else of Triton."""
    assert labels([report for report in compiled(version) if report["no_short_road"]]) == []


@every_triton
def test_rows_are_read_and_written_in_vectors(version: str) -> None:
    """16 bytes at once, or all that a thread has of a chunk. Not weights, because several narrow rows share them."""
    checked = 0
    for report in compiled(version):
        shares = {name: share for name, share in report["shares"].items() if name != "S"}
        for _, name, size, _ in report["accesses"] if report["aligned"] else []:
            if name in shares:
                assert size >= min(16, shares[name]), f"{report['label']}: {name} in accesses of {size} bytes"
                checked += 1
    assert checked > 200


@every_triton
def test_registers_are_not_spilled(version: str) -> None:
    """In the forward kernels. The tables of the gradients are tuned, with spills included."""
    for report in compiled(version):
        if report["name"].endswith("_backward"):
            continue
        held = MOST_STACK_OF_BLOCKS if report["name"] == "rmsnorm_block_quant" else MOST_STACK
        most = held if report["width"] <= HELD_WIDTH else MOST_STACK_OF_WIDE_ROWS
        assert report["stack"] <= most, f"{report['label']}: {report['stack']} bytes, {report['registers']} registers"


# --- the checks find what they look for -----------------------------------------------------------------------------

PLANTED = """
.visible .entry kernel(
    .param .u64 .ptr .global .align 1 kernel_param_0,
    .param .u64 .ptr .global .align 1 kernel_param_1,
    .param .u32 kernel_param_2
)
.reqntid 128
{
    ld.param.b64 %rd1, [kernel_param_0];
    ld.param.b64 %rd2, [kernel_param_1];
    ld.param.b32 %r9, [kernel_param_2];
    mul.wide.s32 %rd3, %r9, 2;
    add.s64 %rd4, %rd1, %rd3;
    @%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd4 + 0 ];
    prefetch.global.L2 [%rd2];
    griddepcontrol.wait;
    add.rn.bf16x2 %r1, %r1, %r2;
    fma.rn.bf16x2 %r1, %r1, %r2, %r3;
    fma.rn.f32.bf16 %r1, %r1, %r2, %r3;
    mul.f64 %rd9, %rd8, %rd7;
    st.global.L1::evict_last.b16 [ %rd2 + 16 ], { %r1 };
    selp.b64 %rd5, %rd1, %rd2, %p2;
    cp.async.cg.shared.global [ %r5 + 0 ], [ %rd5 + 32 ], 0x10, %r6;
}
"""


def test_accesses_are_found_in_text() -> None:
    from tests.kernels import ptx

    assert ptx.parameters(PLANTED) == [8, 8, 4]
    assert ptx.accesses(PLANTED) == [
        ptx.Access(False, 0, 16, True),
        ptx.Access(True, 1, 2, False),
        ptx.Access(False, 0, 16, False),  # through one of two pointers
        ptx.Access(False, 1, 16, False),
    ]
    assert ptx.narrow_arithmetic(PLANTED) == ["fma.rn.bf16x2", "mul.f64"]
