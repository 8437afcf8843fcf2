"""The same on the kernels."""

from tests.spec.test_refused import test_refused

__all__ = ["test_refused"]
