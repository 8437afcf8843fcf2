"""Strides on the kernels, up to three levels of them and others for every tensor: the cases of the specification."""

from tests.spec.test_layouts import (
    test_only_what_is_written_changes,
    test_out_may_be_the_input,
    test_outputs_are_contiguous,
    test_right_in_every_layout,
    test_the_in_place_functions_write_both_tensors,
    test_the_memory_between_rows_stays,
)

__all__ = [
    "test_only_what_is_written_changes",
    "test_out_may_be_the_input",
    "test_outputs_are_contiguous",
    "test_right_in_every_layout",
    "test_the_in_place_functions_write_both_tensors",
    "test_the_memory_between_rows_stays",
]
