"""A row alone and the same row in any batch have the same bits.

The grid: every op, with its variants in turn x every dtype x widths for every sort of launch (one row a program or
several, one chunk or many, weights read early or late, rows read again). The largest batch is compared with its first
rows and its last rows in every smaller size, and with single rows. The sizes lie around those at which tiles and
launches change, and beyond the switch to the launch of large batches. layernorm_linear is left out, because its matrix
product is PyTorch's, which promises no such thing.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from norm_plugin.kernels import configs
from norm_plugin.op import Op
from norm_plugin.ops import OPS
from tests.kernels import twins
from tests.kernels.device import COMPILED, DEVICE
from tests.kernels.test_widths import VARIANTS, at
from tests.kernels.twins import TRITON
from tests.spec import samples
from tests.spec.test_rows import rows_of

BATCHES = [1, 2, 3, 31, 64, 65, 255, 256, 257, 4096] if COMPILED else [1, 3, 9]
WIDTHS = [64, 80, 128, 256, 512, 1024, 1280, 2048, 2880, 4096, 5120, 7168, 8192, 12288, 16384, 18432, 32768, 131072]
WIDTHS = WIDTHS if COMPILED else [80, 1000]
DTYPES = [torch.float16, torch.bfloat16, torch.float32] if COMPILED else [torch.bfloat16]
NAMES = [name for name in OPS if name != "layernorm_linear"]

#: Batches of more elements would take seconds, and only narrower rows switch to the launch of large batches.
MOST_ELEMENTS = 2**27


def batch(op: Op, variant: samples.Arguments, rows: int, width: int, dtype: torch.dtype) -> samples.Arguments:
    """A call on many rows, drawn where they are used."""
    a = TRITON.arguments(op, (1, width), dtype, **variant)
    generator = torch.Generator(DEVICE).manual_seed(width)
    for name in samples.alike(op):
        if a[name] is not None:
            drawn = torch.randn(rows, a[name].shape[-1], generator=generator, device=DEVICE)
            a[name] = (drawn.square() * width if name == "sums" else drawn).to(a[name].dtype)
    return a


def all_equal(part: tuple[Tensor, ...], whole: tuple[Tensor, ...]) -> bool:
    return all(twins.same_bits(*pair) for pair in zip(part, whole, strict=True))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_row_does_not_depend_on_its_batch(name: str, dtype: torch.dtype, width: int) -> None:
    op = OPS[name]
    variant = VARIANTS[name][(WIDTHS.index(width) + DTYPES.index(dtype)) % len(VARIANTS[name])]
    batches = [rows for rows in BATCHES if rows * width <= MOST_ELEMENTS]
    a = batch(op, at(op, variant, width), max(batches), width, dtype)
    whole = twins.uncompared(op, a)
    for rows in batches:
        for part in (slice(0, rows), slice(max(batches) - rows, None), slice(rows - 1, rows)):
            found = twins.uncompared(op, rows_of(op, a, part))
            assert all_equal(found, tuple(t[part] for t in whole)), f"rows {part} of {max(batches)}"


@pytest.mark.parametrize("name", NAMES)
def test_heads_of_a_fused_projection_do_not_depend_on_its_tokens(name: str) -> None:
    """3-D rows with two strides: q of a fused qkv."""
    op, tokens = OPS[name], 257 if COMPILED else 3
    a = batch(op, VARIANTS[name][0], tokens * 12, 128, torch.bfloat16)
    for key in samples.alike(op):
        if a[key] is not None:
            a[key] = a[key].view(tokens, 12, -1)[:, :8]
    whole = twins.uncompared(op, a)
    for token in (0, tokens // 2, tokens - 1):
        assert all_equal(
            twins.uncompared(op, rows_of(op, a, slice(token, token + 1))),
            tuple(t[token : token + 1] for t in whole),
        )


@pytest.mark.parametrize("name", NAMES)
def test_a_row_does_not_depend_on_a_forced_switch(name: str) -> None:
    """A table may say from which batch on weights are read late. Here it says a small one."""
    op = OPS[name]
    a = batch(op, VARIANTS[name][0], 1024 if COMPILED else 17, 128, torch.bfloat16)
    with configs.forced(4, 4, 1, 1):
        whole = twins.uncompared(op, a)
        part = twins.uncompared(op, rows_of(op, a, slice(3, 4)))
    assert all_equal(part, tuple(t[3:4] for t in whole))
