"""Says whether a backend can run here at all, before anything slow begins."""

from __future__ import annotations

import importlib.util
import os


def why_not(backend: str, device: str, dtype: str = "") -> str:
    """Why a backend cannot run on a device, and what to do; "" if it can.

    `dtype`: that of a model whose answers will be compared. It may be bf16 if it is auto.
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
