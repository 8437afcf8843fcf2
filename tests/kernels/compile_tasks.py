"""Which kernels compile_only compiles: every op, and of the launch configurations those that a table may choose."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from norm_plugin.gradients import BACKWARD_OPS
from norm_plugin.ops import OPS
from tests.spec import samples

BF16, FP32, E4M3, E5M2 = torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2
TYPES = {
    torch.float16: "fp16",
    BF16: "bf16",
    FP32: "fp32",
    E4M3: "fp8e4nv",
    E5M2: "fp8e5",
    torch.int8: "i8",
    torch.int64: "i64",
}

#: Compute capability -> (dependent launches, an fp8 unit). 80 has no e4m3 at all: those ops stay native there.
ARCHITECTURES = {80: (False, False), 90: (True, True), 100: (True, True)}

EVERY_OP = OPS | BACKWARD_OPS

#: Ops whose kernels are those of another op, variant by variant.
ALIKE = {"rmsnorm_out": "rmsnorm", "add_rmsnorm": "fused_add_rmsnorm"}

#: One call of each table of launch configurations.
TABLES: list[tuple[str, samples.Arguments]] = [
    ("rmsnorm", {}),
    ("fused_add_rmsnorm", {}),
    ("layernorm", {}),
    ("gated_norm", {"is_rms_norm": True}),
    ("split_sums", {}),
    ("split_rmsnorm", {}),
    ("rmsnorm_quant", {}),
    ("rmsnorm_dynamic_quant", {"residual": None}),
    ("rmsnorm_block_quant", {"residual": None}),
]
WIDTHS = [64, 512, 2880, 4096, 7168, 8192, 16384, 18432, 65536]
FEW_WIDTHS = [4096, 7168]

#: A backward call launches up to three kernels: the statistics of rows in parts, gradients, sums over the rows.
BACKWARD: list[tuple[str, samples.Arguments]] = [
    ("rmsnorm_backward", {}),
    ("rmsnorm_backward", {"residual_grad": torch.empty(0)}),
    ("layernorm_backward", {}),
    ("gated_norm_backward", {"is_rms_norm": True, "bias": None}),
    ("gated_norm_backward", {"norm_before_gate": False, "group_size": 64}),
]
BACKWARD_WIDTHS = [64, 4096, 16384, 65536]

#: Rows whose stride takes more than 32 bits; such a call never goes the short road.
FAR = "far"


@dataclass(frozen=True)
class Task:
    """One kernel: the op, how it is called, and for which architecture."""

    name: str
    variant: samples.Arguments
    shape: tuple[int, ...]
    arch: int = 90
    dtype: torch.dtype = BF16
    layout: str = "contiguous"
    lean: bool = False

    @property
    def label(self) -> str:
        call = samples.label(self.name, self.variant)
        return f"{call} {list(self.shape)} {TYPES[self.dtype]} {self.layout} sm_{self.arch}{' lean' * self.lean}"


def on(arch: int, name: str, variant: samples.Arguments) -> samples.Arguments:
    """The variant with e5m2 for e4m3 where there is none."""
    key = "out_dtype" if "out" in OPS[name].arguments else "quant_dtype"
    e4m3 = name.endswith("quant") and variant.get(key, E4M3) == E4M3
    return variant | {key: E5M2} if arch == 80 and e4m3 else variant


def tasks(few: bool) -> Iterator[Task]:
    """Every variant of every op for Hopper, one for the others; the tables in every layout, dtype and width."""
    for name, variants in samples.VARIANTS.items():
        if name == "layernorm_linear":  # layernorm's kernel
            continue
        for arch in ARCHITECTURES:
            yield Task(name, on(arch, name, variants[0]), (4, 256), arch)
        for variant in [] if few or name in ALIKE else variants[1:]:
            if "variance_size" not in variant:
                yield Task(name, variant, (4, 256))
    for name, variant in TABLES:
        for width in FEW_WIDTHS if few else WIDTHS:
            yield Task(name, variant, (4, width))
    for name, variant in [] if few else TABLES[:4]:
        yield Task(name, variant, (2, 3, 4, 128), layout="qkv_slice")
        yield Task(name, variant, (2, 3, 4, 128), layout="transposed")
        yield Task(name, variant, (4, 1000), dtype=torch.float16, layout="padded")
        yield Task(name, variant, (4, 4096), dtype=FP32)
        yield Task(name, variant | {"weight_dtype": FP32}, (4, 4096))
        for width in (5120, 16384):
            yield Task(name, variant, (4, width), lean=True)
        for arch in (80, 100):
            yield Task(name, variant, (4, 4096), arch)
            yield Task(name, variant, (4, 65536), arch)
    for name in BACKWARD_OPS:
        for arch in ARCHITECTURES:
            yield Task(name, {}, (4, 256), arch)
    for name, variant in [] if few else BACKWARD:
        for width in BACKWARD_WIDTHS:
            yield Task(name, variant, (4, width))
    for name in ("rmsnorm", "gated_norm", "split_sums", "rmsnorm_backward"):  # a kernel each
        yield Task(name, {}, (4, 4096), layout=FAR)
