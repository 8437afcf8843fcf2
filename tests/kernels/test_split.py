"""Rows that lie in parts on several ranks, on their kernel: the cases of the specification."""

from tests.spec.test_split import (
    test_norm,
    test_rows_of_zeros_without_eps_are_nan_as_in_torch,
    test_sums,
    test_the_parts_make_the_whole,
    test_the_sums_of_other_ranks_count,
    test_z_may_have_its_own_dtype,
)

__all__ = [
    "test_norm",
    "test_rows_of_zeros_without_eps_are_nan_as_in_torch",
    "test_sums",
    "test_the_parts_make_the_whole",
    "test_the_sums_of_other_ranks_count",
    "test_z_may_have_its_own_dtype",
]
