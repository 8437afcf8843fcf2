"""Rows on the kernels: none, of any rank and width, not finite. The cases of the specification."""

from tests.spec.test_rows import (
    test_a_row_that_is_not_finite_spoils_no_other,
    test_no_rows,
    test_ranks_and_widths,
)

__all__ = [
    "test_a_row_that_is_not_finite_spoils_no_other",
    "test_no_rows",
    "test_ranks_and_widths",
]
