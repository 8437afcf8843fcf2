"""Binds the two ops for rows whose parts lie on several ranks to the gated kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from norm_plugin.kernels import Bound, Kernel
from norm_plugin.kernels.gated import bind
from norm_plugin.native.rms import maker_of_outputs
from norm_plugin.numerics import GATED_NUMERICS


def bind_sums(x: Tensor, z: Tensor | None, numerics: str) -> Bound:
    launch = bind(x, None, None, z, None, GATED_NUMERICS[numerics], rms=True, gate_first=True)

    def run(x: Tensor, z: Tensor | None, numerics: str) -> Tensor:
        sums = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
        launch(sums.numel(), 0.0, x, z, None, None, None, None, sums)
        return sums

    return Bound(run, (launch,))


def bind_rmsnorm(
    x: Tensor, weight: Tensor | None, z: Tensor | None, sums: Tensor, full_width: int, eps: float, numerics: str
) -> Bound:
    new_output, numbers = maker_of_outputs(x), GATED_NUMERICS[numerics]
    launch = bind(x, weight, None, z, new_output(x), numbers, rms=True, gate_first=True, full_width=full_width)

    def run(
        x: Tensor, weight: Tensor | None, z: Tensor | None, sums: Tensor, full_width: int, eps: float, *_: Any
    ) -> Tensor:
        out = new_output(x)
        launch(sums.numel(), eps, x, z, weight, None, out, None, sums.contiguous())
        return out

    return Bound(run, (launch,))


KERNELS: dict[str, Kernel] = {"split_sums": bind_sums, "split_rmsnorm": bind_rmsnorm}
