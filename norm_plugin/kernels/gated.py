"""Binds the gated norms to their Triton kernel: which calls it refuses, and how it is launched."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from norm_plugin.kernels import Bound, Kernel
from norm_plugin.kernels.binding import bind_rows, roundings
from norm_plugin.kernels.gated_kernel import Recipe, gated_kernel
from norm_plugin.kernels.launch import Launch, has_fp8_unit
from norm_plugin.native.rms import maker_of_outputs
from norm_plugin.numerics import GATED_NUMERICS, Numerics


def bind(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, z: Tensor | None, out: Tensor | None, numerics: Numerics,
    *, group: int | None = None, rms: bool = False, gate_first: bool = False, sigmoid: bool = False,
    qmax: float | None = None, full_width: int = 0,
) -> Launch:  # fmt: skip
    """The launch for the signature of these tensors. Without `out`, it computes sums of squares."""
    width = x.shape[-1] if group is None else group
    unread = "round_before_quant" if qmax is None else "round_before_weight"
    recipe = Recipe(
        groups=x.shape[-1] // width, rms=rms, gate_first=z is not None and gate_first, sigmoid=sigmoid,
        qmax=1.0 if qmax is None else qmax, full_width=full_width, fp8_unit=has_fp8_unit(x.device),
        **roundings(Recipe, numerics, unread),
    )  # fmt: skip
    table = "gated" if rms else "layer"
    return bind_rows(gated_kernel, table, recipe, (x, z, out), (weight, bias), width=width)


def bind_gated_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, z: Tensor | None, eps: float, group_size: int | None,
    norm_before_gate: bool, is_rms_norm: bool, activation: str, numerics: str,
) -> Bound:  # fmt: skip
    new_output = maker_of_outputs(x)
    launch = bind(
        x, weight, bias, z, new_output(x), GATED_NUMERICS[numerics], group=group_size, rms=is_rms_norm,
        gate_first=not norm_before_gate, sigmoid=activation == "sigmoid",
    )  # fmt: skip
    width = x.shape[-1] if group_size is None else group_size

    def run(x: Tensor, weight: Tensor | None, bias: Tensor | None, z: Tensor | None, eps: float, *_: Any) -> Tensor:
        out = new_output(x)
        launch(out.numel() // width, eps, x, z, weight, bias, out, None, None)
        return out

    return Bound(run, (launch,))


KERNELS: dict[str, Kernel] = {"gated_norm": bind_gated_norm}
