"""Every test here runs the native path, as in tests/spec: bits are compared, so sums must be PyTorch's."""

from tests.spec.conftest import native_backend

__all__ = ["native_backend"]
