"""Every test here asks the native path, as those of the specification do: bits are compared, so sums are PyTorch's."""

from tests.spec.conftest import native_backend

__all__ = ["native_backend"]
