"""The same on the kernels, whose launches are bound to the first call of a signature."""

from tests.spec.test_order_of_calls import *  # noqa: F403
