"""RMSNorm, the fused add, Gemma's variant and the l2 norm on their kernel: the cases of the specification."""

from tests.spec.test_rms import (
    test_add_rmsnorm,
    test_gemma_adds_one_in_fp32,
    test_l2norm,
    test_rmsnorm,
    test_rows_of_zeros_without_eps_are_nan_as_in_torch,
    test_the_ops_that_write_give_the_bits_of_the_functional_ones,
)

__all__ = [
    "test_add_rmsnorm",
    "test_gemma_adds_one_in_fp32",
    "test_l2norm",
    "test_rmsnorm",
    "test_rows_of_zeros_without_eps_are_nan_as_in_torch",
    "test_the_ops_that_write_give_the_bits_of_the_functional_ones",
]
