"""Whether the backend that is asked for can run at all, before anything slow is begun."""

from __future__ import annotations

import importlib.util
import os


def why_not(backend: str, device: str, dtype: str = "") -> str:
    """What is missing for a backend on a device and what to do; "" where nothing is. Only Triton needs anything.

    With the `dtype` of a model whose answers are to be compared; auto may be bf16.
    """
    if backend != "triton":
        return ""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed here: install it, or ask for the backend native (or auto)."
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return (
            "Triton compiles for GPUs, and the engine would run on a CPU: torch finds no GPU here, or a CPU was asked "
            "for. Ask for the backend native (or auto), use a machine with a GPU, or set TRITON_INTERPRET=1 to "
            "interpret the kernels, slowly."
        )
    if device == "cpu" and dtype in ("bfloat16", "auto"):
        return (
            "Triton's interpreter cuts fp32 off to bf16 where a GPU rounds, so answers in bf16 are not those of a GPU. "
            "Compare in another dtype: --dtype float32."
        )
    return ""
