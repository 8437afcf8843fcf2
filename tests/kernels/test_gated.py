"""The gated norms on their kernel: the cases of the specification, and groups of any width."""

from tests.spec.test_gated import (
    test_gated_norm,
    test_swish_is_silu,
    test_z_may_have_its_own_dtype,
)

__all__ = [
    "test_gated_norm",
    "test_swish_is_silu",
    "test_z_may_have_its_own_dtype",
]
