"""Rows of every width, on every op: right, and different from the native twin only where a tie lies between them.

The grid: every op x every width, with the op's variants and the dtypes in turn. With three rows, the last program of
several rows has fewer. Wide rows are held in one chunk or in many, or read again for the output.
"""

from __future__ import annotations

import pytest
import torch

from norm_plugin.kernels import configs
from norm_plugin.op import Op
from norm_plugin.ops import OPS
from tests.kernels import twins
from tests.kernels.device import COMPILED
from tests.kernels.twins import TRITON
from tests.spec import judge, samples

ROWS = 3
SMALL = [1, 3, 64, 80, 111, 128, 1000, 1024, 2880, 5127]
LARGE = [4096, 7168, 8192, 12288, 16384, 18432, 32768, 65536, 131072]
WIDTHS = [*SMALL, *LARGE] if COMPILED else SMALL
DTYPES = [torch.bfloat16, torch.float32, torch.float16]

#: Every variant that a kernel does.
VARIANTS = {name: [v for v in found if "variance_size" not in v] for name, found in samples.VARIANTS.items()}


def at(op: Op, variant: samples.Arguments, width: int) -> samples.Arguments:
    """A variant for this width. The groups of a gated norm are half a row, not 16 columns."""
    groups = op.name == "gated_norm" and variant.get("group_size") is not None
    return variant | {"group_size": width // 2 if width % 2 == 0 else None} if groups else variant


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", OPS)
def test_right_at_every_width(name: str, width: int) -> None:
    op, place = OPS[name], WIDTHS.index(width)
    dtype, variant = DTYPES[place % 3], VARIANTS[name][place % len(VARIANTS[name])]
    a = TRITON.arguments(op, (ROWS, width), dtype, **at(op, variant, width))
    outputs = TRITON.outputs(op, a)
    judge.check(op, a, outputs)
    twins.seldom_apart(op, a, outputs, twins.native(op, a))


@pytest.mark.parametrize("group", [80, 128, 512, 1280, 2560])
@pytest.mark.parametrize("is_rms_norm", [True, False], ids=["rms", "layer"])
@pytest.mark.parametrize("before", [True, False], ids=["norm_first", "gate_first"])
def test_groups_of_every_width(group: int, is_rms_norm: bool, before: bool) -> None:
    """In rows of 2560 with two levels of strides, where the place of a group in its row counts too."""
    op = OPS["gated_norm"]
    for dtype in DTYPES:
        a = TRITON.arguments(
            op, (3, 1, 2560), dtype, group_size=group, is_rms_norm=is_rms_norm, norm_before_gate=before
        )
        outputs = TRITON.outputs(op, a)
        judge.check(op, a, outputs)
        twins.seldom_apart(op, a, outputs, twins.native(op, a))


# --- rows that do not fit in registers ----------------------------------------------------------------------------

CASES = [(OPS[name], variant) for name, variants in VARIANTS.items() for variant in variants]


@pytest.mark.parametrize("width", [1000, 3000])
@pytest.mark.parametrize(("op", "variant"), CASES, ids=[samples.label(op.name, variant) for op, variant in CASES])
def test_rows_that_are_read_again(
    op: Op, variant: samples.Arguments, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With room for two chunks of 256, a row of 1000 has two that are read again, and a row of 3000 has ten: more than
    are read at once, and not a multiple of that."""
    monkeypatch.setattr(configs, "HELD_BYTES", 1024)
    with configs.forced(1, 1, 0, 0):
        made = configs.make(op.kind, width, 2, 1, 1, 0, 0)
        assert 1 <= made.held < made.chunks
        a = TRITON.arguments(op, (2, width), torch.bfloat16, **at(op, variant, width))
        outputs = TRITON.outputs(op, a)
    judge.check(op, a, outputs)
    twins.seldom_apart(op, a, outputs, twins.native(op, a))
