"""Compile the kernel across ranks for GPUs that are not here, and print what its machine code is like, as JSON.

    python tests/ranks/compile_only.py [--few]

As tests/kernels/compile_only.py does for the others: no GPU, no group, nothing runs. --few leaves out what does
not depend on Triton's version.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import triton

from norm_plugin.kernels import launch
from norm_plugin.kernels import ranks as kernel
from norm_plugin.ranks import workspace
from norm_plugin.ranks.workspace import Workspace
from tests.kernels import ptx
from tests.kernels.compile_only import Bound, compiled, resources, short_road
from tests.kernels.compile_tasks import Task

BF16, FP32 = torch.bfloat16, torch.float32
KINDS = ("few rows", "many rows", "two shots")

#: (architecture, ranks, width, dtype, op). One rank is what the tests on GPUs compare with.
TASKS = [
    *itertools.product([90], [1, 2, 4, 8], [2880, 4096, 8192], [BF16], ["add"]),
    (90, 2, 4096, BF16, "norm"),
    (90, 2, 4096, BF16, "sandwich"),
    (90, 2, 7168, FP32, "add"),
    (90, 1, 7168, FP32, "add"),
    (80, 2, 4096, BF16, "add"),
    (100, 2, 4096, BF16, "add"),
]


def reports(few: bool) -> Iterator[dict[str, Any]]:
    for arch, size, width, dtype, op in TASKS[-4:] if few else TASKS:
        workspace.enter(Workspace("compiled", 0, size, "", 8, 4 * 16384))
        x, weight, pointers = torch.empty(2, width, dtype=dtype), torch.empty(width), torch.empty(8, dtype=torch.int64)
        residual, post = None if op == "norm" else x, weight if op == "sandwich" else None
        with mock.patch.object(kernel, "use_pdl", return_value=arch >= 90):
            bound = kernel.bind(x, residual, post, weight, "compiled", 1e-6, "fp32", False, None)
        for kind, made in zip(KINDS, bound.launches, strict=True):
            if size == 1 and kind == "two shots":
                continue
            given = (x, residual, post, weight, x, residual, pointers, pointers)
            found, _ = compiled(Bound(made, given), Task("", {}, (2, width), arch, dtype))
            registers, stack = resources(found.asm["cubin"])
            text = found.asm["ptx"]
            code = text[text.index(".entry") :]
            first = re.search(r"\b(ld|st)\.(volatile\.)?global", code)
            assert first is not None
            yield {
                "label": f"{op} {width} {dtype} of {size} ranks, {kind}, sm_{arch}",
                "registers": registers,
                "stack": stack,
                "before_wait": arch >= 90 and first.start() < code.index("griddepcontrol.wait"),
                "order": [width, str(dtype), op, made.constants["exchange"]._asdict()["lanes"]],
                "layouts": layouts(found.asm["ttgir"]),
                "no_short_road": short_road(Bound(made, given), found, ptx.parameters(text)),
            }


def layouts(ttgir: str) -> list[str]:
    """The shapes and layouts of what is summed in fp32, from which the order of the sums follows."""
    named = dict(re.findall(r"^(#\w+) = (.*)$", ttgir, re.MULTILINE))
    summed = re.findall(r"\}\) : \(tensor<(\d+x\d+xf32), (#\w+)>\)", ttgir)
    return [f"{shape} {named.get(layout, layout)}" for shape, layout in summed]


if __name__ == "__main__":
    with mock.patch.object(launch, "processors", return_value=132):
        print(json.dumps({"triton": triton.__version__, "reports": list(reports("--few" in sys.argv))}))
