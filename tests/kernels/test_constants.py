"""The groups of constants that a kernel is compiled for: Triton tells two of them apart by every field."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("triton")
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
