"""The named roundings. Every kernel, native op and engine adapter takes its rounding from this table.

h is x, or x + residual; s is rsqrt(mean(h^2) + eps); b() rounds to the activation dtype. All arithmetic is fp32
(fp64 for fp64 inputs). The residual always becomes b(x + residual), in its own dtype.
"""

from __future__ import annotations

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

FP32 = Numerics(
    "fp32",
    "b(h * s * w)",
    "FlashInfer, sgl_kernel, Quack, SGLang; vLLM with an fp32 weight (Gemma)",
)
HF = Numerics(
    "hf",
    "b(b(h * s) * w)",
    "Hugging Face Llama; vLLM's native path with a bf16 weight",
    round_before_weight=True,
)
VLLM_C = Numerics(
    "vllm_c",
    "b(b(x + r) * s * w), s from b(x + r)",
    "vLLM's CUDA fused add",
    variance_of_rounded_sum=True,
    output_of_rounded_sum=True,
)
SGL_JIT = Numerics(
    "sgl_jit",
    "b(b(x + r) * w * s), s from x + r",
    "SGLang's JIT fused add",
    output_of_rounded_sum=True,
    weight_before_scale=True,
)
TORCH = Numerics(
    "torch",
    "b(h * s * w), by PyTorch's own layer_norm, silu, sigmoid",
    "vLLM's LayerNorm; the native paths of its gated norms",
    torch_functions=True,
)
TORCH_HF = Numerics(
    "torch_hf",
    "b(b(h * s) * w), by PyTorch's own silu, sigmoid",
    "Mixer2's native path",
    round_before_weight=True,
    torch_functions=True,
)
FLASHINFER_LAYER = Numerics(
    "flashinfer_layer",
    "b(norm) / scale",
    "FlashInfer's layernorm_quant",
    round_before_quant=True,
)

NUMERICS: dict[str, Numerics] = {n.name: n for n in (FP32, HF, VLLM_C, SGL_JIT)}

#: The gated norms keep fp32 throughout or round before the weight. PyTorch's own functions are numerics of their own,
#: because on a CPU their last bits depend on where a value lies in its tensor.
GATED_NUMERICS: dict[str, Numerics] = {n.name: n for n in (FP32, HF, TORCH, TORCH_HF)}

LAYER_NUMERICS: dict[str, Numerics] = {n.name: n for n in (FP32, TORCH)}

#: FlashInfer rounds its LayerNorm before it quantises it, and does not round its RMSNorm.
LAYER_QUANT_NUMERICS: dict[str, Numerics] = {n.name: n for n in (FP32, FLASHINFER_LAYER)}

#: silu and swish are two names for z * sigmoid(z).
ACTIVATIONS: tuple[str, ...] = ("silu", "swish", "sigmoid")


def table() -> str:
    """The named roundings as a Markdown table."""
    every = NUMERICS | GATED_NUMERICS | LAYER_NUMERICS | LAYER_QUANT_NUMERICS
    rows = [f"| `{n.name}` | `{n.formula}` | {n.used_by} |" for n in every.values()]
    return "\n".join(["| numerics | output | who uses it |", "|---|---|---|", *rows])
