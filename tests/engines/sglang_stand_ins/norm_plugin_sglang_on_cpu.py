"""TESTS ONLY. What SGLang 0.5.23 lacks on a CPU without AMX, put in its place while its modules are imported.

`scripts/engine_sglang` has this imported by every Python of .venv-sglang, because SGLang starts processes of its own.
It replaces no norm:

- torchvision, before it is imported: PyPI has its CUDA build, whose library does not load here. Its Python part works
  once the two operators that it registers fakes for are declared.
- the gated norm's `_get_sm_count`: it asks the CUDA driver, also for a tensor on the CPU. A constant for those; it only
  chooses how many rows a program takes.
- Mamba's causal convolutions: nothing binds these names on a CPU; they become the ones in the `sgl_kernel` beside this.
- Triton's autotuner, in the interpreter: it asks the driver for a timer. The first configuration is taken.
- Triton's interpreter: it stores bf16 cut off instead of rounded, and computes on the bits of bf16 as if they were
  integers. Both are mended, with fp32 between, so that stock kernels can be what ours are compared with.
- the deterministic mode: it refuses the only attention that a CPU has, and replaces torch's products by kernels for a
  GPU. Here the attention is allowed and the products stay; all that asks for the mode is told that it is on.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
from typing import Any

_kept: list[Any] = []


def declare_torchvision_operators() -> None:
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _kept.append(library)


def count_processors(module: Any) -> None:
    asked = module._get_sm_count
    module._get_sm_count = lambda device: 4 if device.type == "cpu" else asked(device)


def bind_convolutions(module: Any) -> None:
    from sgl_kernel import mamba

    for name in ("causal_conv1d_fn", "causal_conv1d_update"):
        for alias in (name, f"{name}_triton"):
            if not hasattr(module, alias):
                setattr(module, alias, getattr(mamba, f"{name}_cpu"))


def tune_nothing(module: Any) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        module.Autotuner._bench = lambda self, *args, config, **rest: [1.0, 1.0, 1.0]


def mend_bf16(module: Any) -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    import numpy
    import triton.language as tl

    cut_off = module._convert_float

    def convert(values: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source != tl.float32 or target != tl.bfloat16:
            return cut_off(values, source, target, rounding)
        bits = numpy.ascontiguousarray(values, dtype=numpy.float32).view(numpy.uint32)
        half = ((bits >> 16) & 1) + numpy.uint32(0x7FFF)  # a tie goes to the even neighbour
        rounded = ((bits + half) >> 16).astype(numpy.uint16)
        nan = numpy.isnan(bits.view(numpy.float32))
        return numpy.where(nan, numpy.uint16(0x7FC0), rounded).reshape(numpy.shape(values))

    def is_bf16(handle: Any) -> bool:
        return bool(handle.dtype.scalar == tl.bfloat16)

    def widened(handle: Any) -> Any:
        if not is_bf16(handle):
            return handle.data
        return (numpy.asarray(handle.data).astype(numpy.uint32) << 16).view(numpy.float32)

    builder = module.InterpreterBuilder
    binary, dot = builder.binary_op, builder.create_dot
    arithmetic = (numpy.add, numpy.subtract, numpy.multiply, numpy.divide, numpy.minimum, numpy.maximum, numpy.fmod)

    def binary_op(self: Any, left: Any, right: Any, op: Any) -> Any:
        if op not in arithmetic or not is_bf16(left):
            return binary(self, left, right, op)
        result = op(widened(left), widened(right))
        return module.TensorHandle(convert(result, tl.float32, tl.bfloat16, None), left.dtype.scalar)

    def create_dot(self: Any, left: Any, right: Any, total: Any, *rest: Any) -> Any:
        if not is_bf16(left) and not is_bf16(right):
            return dot(self, left, right, total, *rest)
        product = numpy.matmul(widened(left), widened(right), dtype=total.data.dtype)
        return module.TensorHandle(product + total.data, total.dtype.scalar)

    module._convert_float, builder.binary_op, builder.create_dot = convert, binary_op, create_dot


def allow_attention(module: Any) -> None:
    module.add_deterministic_attention_backend_choices(["torch_native"])


def keep_products(module: Any) -> None:
    def enable_batch_invariant_mode(enable_bmm: bool = True) -> None:
        module._batch_invariant_MODE = True

    module.enable_batch_invariant_mode = enable_batch_invariant_mode


BEFORE = {"torchvision": declare_torchvision_operators}
AFTER = {
    "sglang.srt.arg_groups.choices": allow_attention,
    "sglang.srt.batch_invariant_ops.batch_invariant_ops": keep_products,
    "sglang.kernels.ops.attention.fla.layernorm_gated": count_processors,
    "sglang.srt.layers.attention.mamba.mamba": bind_convolutions,
    "triton.runtime.autotuner": tune_nothing,
    "triton.runtime.interpreter": mend_bf16,
}


class Finder(importlib.abc.MetaPathFinder):
    """Does what BEFORE and AFTER say when a module is imported for the first time."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname in BEFORE:
            BEFORE.pop(fullname)()
        after = AFTER.pop(fullname, None)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target) if after else None
        if after is None or spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            after(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, Finder())
