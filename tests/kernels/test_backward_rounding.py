"""What a sum over rows loses to its roundings is added to it, in the backward kernels."""

from __future__ import annotations

import pytest
import torch

from norm_plugin.kernels import backward_configs as configs
from norm_plugin.ops import OPS
from tests.kernels.backward_calls import forced, gradients
from tests.kernels.device import COMPILED
from tests.kernels.twins import TRITON


@pytest.mark.parametrize(
    ("entry", "rows", "width"), [((1, 1, 8, 1), 16, 48), ((), 10032 if COMPILED else 152, 2 * configs.PART)], ids=str
)
def test_sums_over_rows_lose_nothing(entry: tuple[int, ...], rows: int, width: int) -> None:
    """Sums of the blocks' parts (one row each), and of a block's 38 rows where a program has one part of them. The
    terms are ones between 2^26 and -2^26, where each is an eighth of the last digit. The normalized x is 1 or -1."""
    a = TRITON.arguments(OPS["layernorm"], (rows, width), torch.float32, eps=0.0)
    signs = torch.tensor([1.0, -1.0], device=a["input"].device).repeat(width // 2)
    a["input"] = signs.expand(rows, width).contiguous()
    dy = torch.ones_like(a["input"])
    dy[0], dy[min(30, rows - 1)] = 2.0**26, -(2.0**26)
    plain = torch.zeros_like(signs)
    for row in dy:
        plain = plain + row
    assert not (plain == rows - 2).any()
    with forced(entry):
        found = gradients("layernorm", a, dy)
    assert torch.equal(found["bias"], torch.full_like(signs, rows - 2))
    torch.testing.assert_close(found["weight"], signs * (rows - 2), rtol=4 * 2.0**-24, atol=0.0)


@pytest.mark.parametrize("entry", [None, (1, 4, 1, 1), ()], ids=str)
def test_a_sum_that_overflows_is_infinite(entry: tuple[int, ...] | None) -> None:
    """As it would be without the compensation, which is NaN then."""
    a = TRITON.arguments(OPS["layernorm"], (9, 48), torch.float32)
    dy = torch.full_like(a["input"], 2e38)
    with forced(entry):
        found = gradients("layernorm", a, dy)
    assert bool((found["bias"] == torch.inf).all())
