"""What the tests of the shortcut call it with."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from norm_plugin import shortcut
from tests.kernels.twins import TRITON

BF16 = torch.bfloat16
WIDTH = 48

needs_guards = pytest.mark.skipif(shortcut.dynamo_guards is None, reason="this torch has no guards")


def x_of(rows: int = 4, width: int = WIDTH, dtype: torch.dtype = BF16, seed: int = 1) -> Tensor:
    return TRITON.make("normal", (rows, width), dtype, seed)


def weight_of(width: int = WIDTH) -> Tensor:
    return TRITON.weights(width, BF16)
