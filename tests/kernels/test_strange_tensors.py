"""The same on the kernels."""

from tests.spec.test_strange_tensors import test_a_meta_tensor_leaves_nothing_behind as test_meta
from tests.spec.test_strange_tensors import (
    test_autocast_changes_no_dtype,
    test_gemma_without_a_weight_scales_by_nothing,
    test_the_negative_bit_is_heard,
)

__all__ = [
    "test_autocast_changes_no_dtype",
    "test_gemma_without_a_weight_scales_by_nothing",
    "test_meta",
    "test_the_negative_bit_is_heard",
]
