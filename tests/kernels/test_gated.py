"""The gated norms on their kernel: the cases of the specification, and groups of any width."""

from tests.spec.test_gated import (
    test_gated_norm,
    test_gates_far_out,
    test_rows_of_zeros_without_eps_are_nan_as_in_torch,
    test_swish_is_silu,
    test_z_may_have_its_own_dtype,
)

__all__ = [
    "test_gated_norm",
    "test_gates_far_out",
    "test_rows_of_zeros_without_eps_are_nan_as_in_torch",
    "test_swish_is_silu",
    "test_z_may_have_its_own_dtype",
]
