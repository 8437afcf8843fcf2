"""LayerNorm in Triton: the gated kernel with one group and no gate."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from norm_plugin.kernels import Bound, Kernel
from norm_plugin.kernels.gated import bind
from norm_plugin.native.layer import linear
from norm_plugin.native.rms import maker_of_outputs
from norm_plugin.numerics import FP32, LAYER_NUMERICS


def bind_layernorm(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, numerics: str = FP32.name
) -> Bound:
    new_output = maker_of_outputs(input)
    launch = bind(input, weight, bias, None, new_output(input), LAYER_NUMERICS[numerics])
    width = input.shape[-1]

    def run(input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *_: Any) -> Tensor:
        out = new_output(input)
        launch(out.numel() // width, eps, input, None, weight, bias, out, None, None)
        return out

    return Bound(run, (launch,))


def bind_layernorm_linear(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, linear_weight: Tensor, linear_bias: Tensor | None, eps: float
) -> Bound:
    norm = bind_layernorm(x, weight, bias, eps)
    normed = norm.run

    def run(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, linear_weight: Tensor, linear_bias: Tensor | None,
        eps: float,
    ) -> Tensor:  # fmt: skip
        return linear(normed(x, weight, bias, eps), linear_weight, linear_bias)

    return Bound(run, norm.launches)


KERNELS: dict[str, Kernel] = {"layernorm": bind_layernorm, "layernorm_linear": bind_layernorm_linear}
