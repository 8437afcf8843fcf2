"""The cases of other projects' tests of training: their shapes, dtypes, flags, tolerances and criteria, as data.

mamba    state-spaces/mamba, tests/ops/triton/test_layernorm_gated.py
fla      fla-org/flash-linear-attention, tests/modules/test_layernorm.py, test_layernorm_gated.py, test_l2norm.py
quack    Dao-AILab/quack, tests/test_rmsnorm.py, test_layernorm.py
liger    linkedin/Liger-Kernel, test/transformers/test_rms_norm.py, test_fused_add_rms_norm.py, test_layer_norm.py

Left out: what has no op here (a norm and its linear with quantised weights, a gated norm of a sum, a gated norm and its
linear), what is not about values (caches, messages), and torch.compile, which tests/spec does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Case:
    """One of their tests. `kind` is a norm of `test_public_cases`, and `how` its flags. `grads` are the incoming
    gradients: random, ones (of a sum), or "first": random, for the first of two outputs. `limits` are the limits of the
    suite's criterion, for outputs and gradients of x, and for gradients of weights; None takes them from the
    reference."""

    suite: str
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    weights: torch.dtype | None
    limits: tuple[tuple[float, float], tuple[float, float] | None]
    how: dict[str, Any] = field(default_factory=dict)
    bias: bool = False
    grads: str = "random"
    layout: str = "contiguous"
    reference: str = "fp32"

    @property
    def rows(self) -> int:
        return torch.Size(self.shape[:-1]).numel()

    @property
    def id(self) -> str:
        dtypes = "-".join(str(t).removeprefix("torch.") for t in (self.dtype, self.weights))
        flags = [f"{key}={value}" for key, value in self.how.items()]
        rest = [name for name in (self.grads, self.layout) if name not in ("random", "contiguous")]
        shape = "x".join(map(str, self.shape))
        return "-".join([self.suite, self.kind, shape, dtypes, *flags, *(["bias"] if self.bias else []), *rest])


def mamba() -> Iterator[Case]:
    limits = (0.0, 8e-3), (0.0, 8e-3)
    for width in (2048, 4096):
        for rms in (False, True):
            for group in (None, 64):
                for z, before in ((False, True), (True, True), *([(True, False)] if rms else [])):
                    for bias in (False, True):
                        how = {"is_rms_norm": rms, "group_size": group, "z": z, "norm_before_gate": before, "eps": 1e-5}
                        yield Case("mamba", "gated", (16, 1024, width), FP16, FP32, limits, how, bias)


def fla() -> Iterator[Case]:
    close = (1e-3, 1e-6), (1e-3, 1e-6)
    for width in (50, 64, 128):
        for affine, bias in ((False, False), (True, False), (True, True)):
            weights = FP32 if affine else None
            yield Case("fla", "layer", (2, 2, 512, width), FP32, weights, close, {"eps": 1e-5}, bias, "ones")
    for width in (64, 128, 512, 1024, 2048, 2052):
        for groups in (1, 4):
            for rms in (True, False):
                how = {"is_rms_norm": rms, "group_size": width // groups, "z": False, "eps": 1e-5}
                yield Case("fla", "gated", (2, 512, width), FP32, FP32, close, how, True, "ones")
    for width in (50, 64, 128, 256):
        yield Case("fla", "rms", (2, 2, 512, width), FP32, FP32, close, {"eps": 0.0}, False, "ones")
    for rows in (1, 2, 4, 8, 16, 32):
        for width in (128, 256, 512):
            yield Case("fla", "rms", (rows, width), FP32, FP32, close, {"eps": 0.0}, False, "ones")
            yield Case("fla", "layer", (rows, width), FP32, FP32, close, {"eps": 1e-5}, True, "ones")
    for rows in (1, 16, 128):
        for width in (50, 64, 128):
            yield Case("fla", "linear", (rows, width), FP32, FP32, close, {"eps": 1e-5}, True, "ones")
    of_layer = ((1, 64, False, "silu", False), (512, 128, True, "silu", True), (2048, 1200, True, "sigmoid", False),
                (50, 50, False, "sigmoid", False))  # fmt: skip
    for rows, width, affine, activation, bias in of_layer:
        how = {"is_rms_norm": False, "activation": activation, "z": True, "eps": 1e-5}
        yield Case("fla", "gated", (2, 2, rows, width), FP32, FP32 if affine else None, close, how, bias, "ones")
    for rows, width, activation in ((1, 64, "silu"), (512, 128, "sigmoid"), (2048, 1200, "silu"), (50, 50, "sigmoid")):
        how = {"is_rms_norm": True, "activation": activation, "z": True, "eps": 0.0}
        yield Case("fla", "gated", (2, 2, rows, width), FP32, FP32, close, how, False, "ones")
    of_fn = ((1, 64, None, FP32), (63, 200, 50, FP32), (65, 1024, 256, FP16), (100, 1028, 257, BF16),
             (33, 513, None, FP32))  # fmt: skip
    for rows, width, group, dtype in of_fn:
        for rms in (False, True):
            for z, before in ((False, True), (True, True), (True, False)):
                how = {"is_rms_norm": rms, "group_size": group, "z": z, "norm_before_gate": before, "eps": 1e-5}
                limits = ((5e-3, 1e-6),) * 2 if dtype == BF16 else close
                yield Case("fla", "gated", (2, rows, width), dtype, FP32, limits, how, not rms, layout="every second")
    wide = {"is_rms_norm": True, "z": True, "eps": 1e-6}
    yield Case("fla", "gated", (256, 12, 6144, 128), BF16, BF16, ((6.3e-2, 1e-6),) * 2, wide, False, "ones")
    of_l2 = ((1, 63, 1, 60, FP32), (1, 65, 2, 512, FP16), (1, 65, 2, 513, BF16), (2, 500, 4, 64, FP32),
             (2, 1000, 2, 100, FP32), (3, 1024, 4, 128, FP32), (4, 1024, 5, 1024, FP16), (4, 1024, 5, 1024, BF16),
             (5, 1024, 6, 2048, FP16), (5, 1024, 6, 2048, BF16))  # fmt: skip
    for *shape, dtype in of_l2:
        yield Case("fla", "l2", tuple(shape), dtype, None, ((5e-3, 1e-6),) * 2, {}, False, "ones", "shifted")


QUACK_WIDTHS = (192, 256, 512, 760, 1024, 1128, 2048, 4096, 8192, 16384, 32768, 65536, 131072, 262144)


def quack() -> Iterator[Case]:
    """eps 1e-5 and 1e-6 take turns; the suite has both everywhere."""
    absolute = {BF16: 1e-1, FP16: 1e-2, FP32: 1e-4}
    for place, width in enumerate(QUACK_WIDTHS):
        for rows in (1, 37, 199, 8192):
            for dtype in (BF16, FP16, FP32):
                if dtype == FP32 and width > 128 * 1024:  # the suite tests only the forward of these
                    continue
                for weights in (BF16, FP16, FP32, None):
                    if rows == 8192 and width > 8192 and weights not in (dtype, FP32):
                        continue
                    of_weights = (1e-3, 1e-4) if weights == FP32 else None
                    how = {"eps": (1e-5, 1e-6)[(place + rows) % 2]}
                    limits = (1e-3, absolute[dtype]), of_weights
                    yield Case("quack", "rms", (rows, width), dtype, weights, limits, how)
    both = (1e-3, 1e-1), (1e-3, 1e-1)
    yield Case("quack", "rms", (8, 4096, 512), BF16, FP32, both, {"eps": 1e-5}, layout="of 576")
    rms = {"is_rms_norm": True, "z": False, "eps": 1e-6}
    yield Case("quack", "gated", (32, 1024), FP16, FP32, ((1e-3, 1e-2), (1e-3, 1e-4)), rms, True)
    for grads in ("first", "random"):
        limits = (1e-3, 1e-2), (1e-3, 1e-2)
        yield Case("quack", "add", (32, 1024), FP16, FP32, limits, {"eps": 1e-6}, grads=grads)
    of_layer = {BF16: 1e-2, FP16: 1e-3, FP32: 1e-4}
    for place, width in enumerate(QUACK_WIDTHS[1:]):
        for rows in (1, 37):
            for dtype, limit in of_layer.items():
                if dtype == FP32 and width > 63 * 1024:
                    continue
                how = {"eps": (1e-5, 1e-6)[(place + rows) % 2]}
                limits = ((4 * limit, 4 * limit),) * 2
                yield Case("quack", "layer", (rows, width), dtype, FP32, limits, how)


def liger() -> Iterator[Case]:
    modes = (("llama", {"numerics": "hf"}), ("gemma", {"gemma": True}), ("none", {}))
    for kind in ("rms", "add"):
        for shape in ((2, 128, 512), (5, 123, 123), (2, 2, 8), (9, 7, 41)):
            for dtype, limit in ((FP32, (1e-6, 1e-4)), (BF16, (2e-2, 2e-1))):
                for mode, how in modes:
                    limits = limit, limit
                    yield Case("liger", kind, shape, dtype, dtype, limits, how | {"eps": 1e-6}, reference=mode)
    for shape in ((2, 8, 64), (4, 16, 128), (1, 1, 1023), (3, 7, 256)):
        yield Case("liger", "layer", shape, FP32, FP32, ((1e-5, 1e-5), (1e-5, 1e-5)), {"eps": 1e-6}, True)


CASES = [*mamba(), *fla(), *quack(), *liger()]
