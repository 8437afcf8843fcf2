"""The groups of constants that a kernel is compiled for: Triton tells two of them apart by every field."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
from norm_plugin import kernels
from norm_plugin.kernels import backward_parts, gated_kernel, rms_kernel
from norm_plugin.kernels.constants import Tile

pytestmark = pytest.mark.without_kernels

GROUPS = [Tile, rms_kernel.Recipe, gated_kernel.Recipe, backward_parts.Tile, backward_parts.Recipe]


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: f"{group.__module__.rpartition('.')[2]}.{group.__name__}")
def test_a_group_of_constants_is_what_triton_wants(group: Any) -> None:
    """It is a key in memory, its text is one on disk, and whoever listens to the compiler gets it as JSON."""
    values = tuple(range(len(group._fields)))
    one = group(*values)
    others = [one._replace(**{field: -1}) for field in group._fields]
    assert len({one, *others}) == len({str(made) for made in (one, *others)}) == len(values) + 1
    assert json.loads(json.dumps(one)) == list(values)
    assert [int(getattr(one, field)) for field in group._fields] == list(values)


@pytest.mark.parametrize("file", sorted(Path(kernels.__file__).parent.glob("*.py")), ids=lambda file: file.name)
def test_no_kernel_calls_what_an_engine_may_replace(file: Path) -> None:
    """vLLM assigns to triton.next_power_of_2, which no kernel can call from then on. Those of ours and of
    triton.language stay."""
    functions = [f for f in ast.walk(ast.parse(file.read_text())) if isinstance(f, ast.FunctionDef)]
    compiled = [f for f in functions if any("triton.jit" in ast.unparse(d) for d in f.decorator_list)]
    for function in compiled:
        inside = [node for statement in function.body for node in ast.walk(statement)]
        names = {n.attr for n in inside if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "triton"}
        assert names == set(), f"{function.name} calls triton.{', triton.'.join(names)}"
