"""Repairs Triton's interpreter where its results differ from a GPU's, and where it takes minutes.

These parts of triton.runtime.interpreter are replaced:

- `_convert_float` truncates fp32 to bf16, and rounds fp32 to fp8 half up without a carry into the exponent. GPUs round
to nearest even. PyTorch does too, so its conversions replace these. - `ReduceOps.generic_reduce` reduces by a custom
function element by element. The replacement reduces whole halves while the length is even, which is also closer to a
GPU. - `create_fma` computes a fused multiply-add as a product and a sum, with two roundings. GPUs round once. The
replacement uses fp64, in which the product of two fp32 is exact. - `_patch_lang` patches all of triton.language at
every call of a device function. The replacement does it once a launch.

float16 is a numpy dtype, and right as it is. Arithmetic on bf16 without a cast to fp32 stays wrong: no kernel here may
do any.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from tests.kernels.device import INTERPRETED, why_not


@contextmanager
def repaired() -> Iterator[None]:
    """Runs the block with the repairs, if kernels run in the interpreter."""
    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):
        if INTERPRETED and not why_not():
            install(patch)
        yield


def install(patch: pytest.MonkeyPatch) -> None:
    """Repairs the interpreter of this process."""
    import triton.language as tl
    from triton.runtime import interpreter

    as_torch = {
        tl.float16: torch.float16,
        tl.bfloat16: torch.bfloat16,
        tl.float32: torch.float32,
        tl.float8e4nv: torch.float8_e4m3fn,
        tl.float8e5: torch.float8_e5m2,
    }
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}

    def convert_float(data: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        ends = as_torch[source], as_torch[target]
        values = torch.from_numpy(np.array(data)).view(ends[0]).to(ends[1])  # a copy: broadcast arrays are read-only
        return values.view(bits[values.itemsize]).numpy().view(interpreter._get_np_dtype(target))

    def generic_reduce(self: Any, given: Any) -> list[Any]:
        def pairs(data: list[np.ndarray]) -> list[tuple[np.ndarray, Any]]:
            return list(zip(data, given, strict=True))

        parts = [np.moveaxis(t.handle.data, self.axis, 0) for t in given]
        while len(parts[0]) > 1:
            half = len(parts[0]) // 2
            ends = [self.to_tensor(p[at : at + half], t.dtype) for at in (0, half) for p, t in pairs(parts)]
            combined = self.combine_fn.fn(*ends)
            combined = combined if isinstance(combined, tuple) else (combined,)
            parts = [t.handle.data for t in combined]
        last = [np.moveaxis(p, 0, self.axis) if self.keep_dims else p[0] for p in parts]
        return [self.to_tensor(p, t.dtype) for p, t in pairs(last)]

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        exact = x.data.astype(np.float64) * y.data + z.data
        return interpreter.TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    patch.setattr(interpreter, "_convert_float", convert_float)
    patch.setattr(interpreter.InterpreterBuilder, "create_fma", create_fma)
    patch.setattr(interpreter.ReduceOps, "generic_reduce", generic_reduce)
    patch.setattr(interpreter, "_patch_lang", once_a_launch(interpreter._patch_lang))


def once_a_launch(patch_lang: Any) -> Any:
    """`patch_lang`, but only for the first function of a launch that names a module of the language. The launch itself
    restores all patches at its end."""
    import triton.language as tl

    patched: list[Any] = []
    seen: set[int] = set()

    class Scope:
        def restore(self) -> None:
            while patched:
                patched.pop().restore()
            seen.clear()

    def patch(function: Any) -> Any:
        names = {id(value) for value in function.__globals__.values() if value is tl or value is tl.core}
        if not names <= seen:
            seen.update(names)
            patched.append(patch_lang(function))
        return Scope()

    return patch
