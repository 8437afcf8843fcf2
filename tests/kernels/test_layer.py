"""LayerNorm, and LayerNorm + linear, on their kernel: the cases of the specification, and strides before a product."""

from __future__ import annotations

import pytest
import torch

from norm_plugin.ops import OPS
from tests.spec import layouts, samples
from tests.spec.test_layer import (
    test_layernorm,
    test_layernorm_linear,
    test_rows_of_zeros_without_eps_are_nan_as_in_torch,
    test_weight_and_bias_may_have_different_dtypes,
)

__all__ = [
    "test_layernorm",
    "test_layernorm_linear",
    "test_rows_of_zeros_without_eps_are_nan_as_in_torch",
    "test_weight_and_bias_may_have_different_dtypes",
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_linear_layer_rounds_once_whatever_the_strides(dtype: torch.dtype) -> None:
    """F.linear adds the bias to a rounded product where x is a transposed 3-D tensor; the op hands it rows."""
    op = OPS["layernorm_linear"]
    a = samples.arguments(op, (4, 3, 48), dtype)
    (expected,) = samples.outputs(op, a)
    (found,) = samples.outputs(op, a | {"x": layouts.transposed(a["x"])})
    assert torch.equal(found, expected)
