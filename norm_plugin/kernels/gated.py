"""The gated norms on their Triton kernel: which calls it refuses, and how it is launched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from norm_plugin.kernels import Kernel
from norm_plugin.kernels.configs import config
from norm_plugin.kernels.gated_kernel import gated_kernel
from norm_plugin.kernels.launch import (
    Launch,
    gpu_of,
    has_fp8_unit,
    layout_or_refuse,
    refuse_numerics,
    refuse_strange,
    use_pdl,
)
from norm_plugin.native.rms import maker_of_outputs
from norm_plugin.numerics import GATED_NUMERICS, Numerics


def bind(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, z: Tensor | None, out: Tensor, group_size: int | None,
    norm_before_gate: bool, is_rms_norm: bool, activation: str, numerics: Numerics, *, qmax: float | None = None,
) -> Launch:  # fmt: skip
    """The launch for a signature, from tensors that have it; `qmax` where the output is quantised by a static scale."""
    refuse_strange(x, weight, bias, z)
    refuse_numerics(numerics, "round_before_weight" if qmax is None else "round_before_quant")
    width = x.shape[-1] if group_size is None else group_size
    return Launch(
        gated_kernel,
        config("gated" if is_rms_norm else "layer", width, x.element_size(), gpu_of(x.device)),
        layout_or_refuse(x, z, out),
        x.device,
        use_pdl(None, x.device),
        {
            "N": width,
            "G": x.shape[-1] // width,
            "RMS": is_rms_norm,
            "HAS_WEIGHT": weight is not None,
            "HAS_BIAS": bias is not None,
            "GATE_FIRST": z is not None and not norm_before_gate,
            "GATE_LAST": z is not None and norm_before_gate,
            "SIGMOID": activation == "sigmoid",
            "HF": numerics.round_before_weight,
            "STATIC": qmax is not None,
            "ROUND": numerics.round_before_quant,
            "QMAX": 1.0 if qmax is None else qmax,
            "FP8_UNIT": has_fp8_unit(x.device),
        },
    )


def bind_gated_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, z: Tensor | None, eps: float, group_size: int | None,
    norm_before_gate: bool, is_rms_norm: bool, activation: str, numerics: str,
) -> Callable[..., Tensor]:  # fmt: skip
    new_output = maker_of_outputs(x)
    out = new_output(x)
    how = (group_size, norm_before_gate, is_rms_norm, activation, GATED_NUMERICS[numerics])
    launch = bind(x, weight, bias, z, out, *how)
    width = launch.constants["N"]

    def run(x: Tensor, weight: Tensor | None, bias: Tensor | None, z: Tensor | None, eps: float, *_: Any) -> Tensor:
        out = new_output(x)
        launch(out.numel() // width, eps, x, z, weight, bias, out, None, None, None)
        return out

    return run


def plain(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, out: Tensor, numerics: Numerics,
    qmax: float | None = None,
) -> Launch:  # fmt: skip
    """A LayerNorm: one group, no gate."""
    return bind(x, weight, bias, None, out, None, True, False, "silu", numerics, qmax=qmax)


KERNELS: dict[str, Kernel] = {"gated_norm": bind_gated_norm}
