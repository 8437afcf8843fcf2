"""The norms with a quantised output on their kernels: the cases of the specification."""

from tests.spec.test_quant import (
    test_a_layernorm_rounded_before_it_is_quantised,
    test_dynamic,
    test_layernorm_quant,
    test_static,
)

__all__ = [
    "test_a_layernorm_rounded_before_it_is_quantised",
    "test_dynamic",
    "test_layernorm_quant",
    "test_static",
]
