"""The two ops of rows that lie in parts on several ranks on their Triton kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from norm_plugin.kernels import Kernel
from norm_plugin.kernels.configs import config
from norm_plugin.kernels.launch import Launch, gpu_of, layout_or_refuse, refuse_numerics, refuse_strange, use_pdl
from norm_plugin.kernels.split_kernel import split_kernel
from norm_plugin.native.rms import maker_of_outputs
from norm_plugin.numerics import GATED_NUMERICS


def bind(
    x: Tensor, weight: Tensor | None, z: Tensor | None, out: Tensor | None, full_width: int, numerics: str
) -> Launch:
    """The launch for a signature, from tensors that have it; without an `out` it is of the sums."""
    refuse_strange(x, weight, z)
    refuse_numerics(GATED_NUMERICS[numerics], "round_before_weight")
    width = x.shape[-1]
    return Launch(
        split_kernel,
        config("gated", width, x.element_size(), gpu_of(x.device)),
        layout_or_refuse(x, z, out),
        x.device,
        use_pdl(None, x.device),
        {
            "N": width,
            "FULL": full_width,
            "GATED": z is not None,
            "HAS_WEIGHT": weight is not None,
            "HF": GATED_NUMERICS[numerics].round_before_weight,
        },
    )


def bind_sums(x: Tensor, z: Tensor | None, numerics: str) -> Callable[..., Tensor]:
    width = x.shape[-1]
    launch = bind(x, None, z, None, width, numerics)

    def run(x: Tensor, z: Tensor | None, numerics: str) -> Tensor:
        sums = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
        launch(sums.numel(), 0.0, x, z, None, sums, None)
        return sums

    return run


def bind_rmsnorm(
    x: Tensor, weight: Tensor | None, z: Tensor | None, sums: Tensor, full_width: int, eps: float, numerics: str
) -> Callable[..., Tensor]:
    new_output = maker_of_outputs(x)
    launch = bind(x, weight, z, new_output(x), full_width, numerics)

    def run(
        x: Tensor, weight: Tensor | None, z: Tensor | None, sums: Tensor, full_width: int, eps: float, *_: Any
    ) -> Tensor:
        out = new_output(x)
        launch(sums.numel(), eps, x, z, weight, sums.contiguous(), out)
        return out

    return run


KERNELS: dict[str, Kernel] = {"split_sums": bind_sums, "split_rmsnorm": bind_rmsnorm}
