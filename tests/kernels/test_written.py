"""The same on the kernels, which write where autograd does not see it."""

from tests.spec.test_written import *  # noqa: F403
