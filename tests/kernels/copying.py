"""A minimal kernel, which shows how values are read, cast and written."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def copy_kernel(X, Y, CAST: tl.constexpr, BLOCK: tl.constexpr):
    """Y = X, cast to Y's dtype before the store or by it."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + at)
    tl.store(Y + at, x.to(Y.dtype.element_ty) if CAST else x)
