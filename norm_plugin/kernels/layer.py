"""LayerNorm in Triton: the gated kernel with one group and no gate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from norm_plugin.kernels import Kernel
from norm_plugin.kernels.gated import plain
from norm_plugin.native.layer import linear
from norm_plugin.native.rms import maker_of_outputs
from norm_plugin.numerics import FP32, LAYER_NUMERICS


def bind_layernorm(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, numerics: str = FP32.name
) -> Callable[..., Tensor]:
    new_output = maker_of_outputs(input)
    launch = plain(input, weight, bias, new_output(input), LAYER_NUMERICS[numerics])
    width = input.shape[-1]

    def run(input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *_: Any) -> Tensor:
        out = new_output(input)
        launch(out.numel() // width, eps, input, None, weight, bias, out, None, None, None)
        return out

    return run


def bind_layernorm_linear(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, linear_weight: Tensor, linear_bias: Tensor | None, eps: float
) -> Callable[..., Tensor]:
    norm = bind_layernorm(x, weight, bias, eps)

    def run(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, linear_weight: Tensor, linear_bias: Tensor | None,
        eps: float,
    ) -> Tensor:  # fmt: skip
        return linear(norm(x, weight, bias, eps), linear_weight, linear_bias)

    return run


KERNELS: dict[str, Kernel] = {"layernorm": bind_layernorm, "layernorm_linear": bind_layernorm_linear}
