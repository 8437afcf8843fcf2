"""The named roundings. Every kernel, native op and engine adapter takes its rounding from this table.

h is x, or x + residual; s is rsqrt(mean(h^2) + eps); b() rounds to the activation dtype. All arithmetic is fp32
(fp64 for fp64 inputs). The residual always becomes b(x + residual), in its own dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Numerics:
    """One way to round a norm. Two paths with the same numerics differ by the order of a sum and the last bits of exp.
    A kernel refuses a numerics that sets a field which the kernel does not read."""

    name: str
    formula: str
    used_by: str
    variance_of_rounded_sum: bool = False
    output_of_rounded_sum: bool = False
    round_before_weight: bool = False
    weight_before_scale: bool = False
    torch_functions: bool = False
    round_before_quant: bool = False


#: The fields that describe a numerics and do not change what it computes.
DESCRIPTION = ("name", "formula", "used_by")

#: The numerics of the RMSNorms, also of those whose output is quantised.
NUMERICS: dict[str, Numerics] = {}

#: The gated norms keep fp32 throughout or round before the weight. PyTorch's own functions are numerics of their own,
#: because on a CPU their last bits depend on where a value lies in its tensor.
GATED_NUMERICS: dict[str, Numerics] = {}

LAYER_NUMERICS: dict[str, Numerics] = {}

#: FlashInfer rounds its LayerNorm before it quantises it, and does not round its RMSNorm.
LAYER_QUANT_NUMERICS: dict[str, Numerics] = {}


def recipe(
    name: str, *, formula: str, used_by: str, known_by: Sequence[dict[str, Numerics]], **roundings: bool
) -> Numerics:
    """A numerics, entered in the tables of the norms that know it."""
    made = Numerics(name, formula, used_by, **roundings)
    for known in known_by:
        known[name] = made
    return made


FP32 = recipe(
    "fp32",
    formula="b(h * s * w)",
    used_by="FlashInfer, sgl_kernel, Quack, SGLang; vLLM with an fp32 weight (Gemma)",
    known_by=(NUMERICS, GATED_NUMERICS, LAYER_NUMERICS, LAYER_QUANT_NUMERICS),
)
HF = recipe(
    "hf",
    formula="b(b(h * s) * w)",
    used_by="Hugging Face Llama; vLLM's native path with a bf16 weight",
    known_by=(NUMERICS, GATED_NUMERICS),
    round_before_weight=True,
)
VLLM_C = recipe(
    "vllm_c",
    formula="b(b(x + r) * s * w), s from b(x + r)",
    used_by="vLLM's CUDA fused add",
    known_by=(NUMERICS,),
    variance_of_rounded_sum=True,
    output_of_rounded_sum=True,
)
SGL_JIT = recipe(
    "sgl_jit",
    formula="b(b(x + r) * w * s), s from x + r",
    used_by="SGLang's JIT fused add",
    known_by=(NUMERICS,),
    output_of_rounded_sum=True,
    weight_before_scale=True,
)
TORCH = recipe(
    "torch",
    formula="b(h * s * w), by PyTorch's own layer_norm, silu, sigmoid",
    used_by="vLLM's LayerNorm; the native paths of its gated norms",
    known_by=(GATED_NUMERICS, LAYER_NUMERICS),
    torch_functions=True,
)
TORCH_HF = recipe(
    "torch_hf",
    formula="b(b(h * s) * w), by PyTorch's own silu, sigmoid",
    used_by="Mixer2's native path",
    known_by=(GATED_NUMERICS,),
    round_before_weight=True,
    torch_functions=True,
)
FLASHINFER_LAYER = recipe(
    "flashinfer_layer",
    formula="b(norm) / scale",
    used_by="FlashInfer's layernorm_quant",
    known_by=(LAYER_QUANT_NUMERICS,),
    round_before_quant=True,
)

#: silu and swish are two names for z * sigmoid(z).
ACTIVATIONS: tuple[str, ...] = ("silu", "swish", "sigmoid")


def table() -> str:
    """The named roundings as a Markdown table."""
    every = NUMERICS | GATED_NUMERICS | LAYER_NUMERICS | LAYER_QUANT_NUMERICS
    rows = [f"| `{n.name}` | `{n.formula}` | {n.used_by} |" for n in every.values()]
    return "\n".join(["| numerics | output | who uses it |", "|---|---|---|", *rows])
