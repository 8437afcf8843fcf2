"""Binds the RMSNorm ops to their Triton kernel: which calls it refuses, and how it is launched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from norm_plugin.kernels import Bound, Kernel, Refusal
from norm_plugin.kernels.binding import bind_rows, refuse_strange, roundings
from norm_plugin.kernels.launch import NOTHING, Launch, has_fp8_unit
from norm_plugin.kernels.rms_kernel import NO_QUANT, PER_BLOCK, PER_TOKEN, STATIC, Recipe, rms_kernel
from norm_plugin.native.rms import maker_of_outputs
from norm_plugin.numerics import NUMERICS, Numerics

#: The table of launch configurations for a way to quantise. With a residual, the table is "add".
TABLES = {NO_QUANT: "rms", STATIC: "static", PER_TOKEN: "token", PER_BLOCK: "block"}


#: By place among the pointers X, R, W, Y, T, S, UB: a fused add writes Y where X is, and T where R is.
IN_PLACE, TOTAL_IN_PLACE = {3: 0, 4: 1}, {4: 1}


def bind(
    input: Tensor, residual: Tensor | None, weight: Tensor | None, out: Tensor, total: Tensor | None,
    numerics: Numerics, gemma: bool = False, variance_size: int | None = None, enable_pdl: bool | None = None,
    *, in_place: bool = False, l2: bool = False, quant: int = NO_QUANT, group: int = 1, qmax: float = 1.0,
    min_scale: float = 1.0,
) -> Launch:  # fmt: skip
    """The launch for the signature of these tensors."""
    if variance_size is not None:
        raise Refusal(f"the variance is of the first {variance_size} columns only")
    added, how = residual is not None, roundings(Recipe, numerics)
    if not added:  # one kernel for all of these
        how |= {"variance_of_rounded_sum": False, "output_of_rounded_sum": False}
    recipe = Recipe(
        gemma=gemma, l2=l2, quant=quant, group=group, qmax=qmax, min_scale=min_scale,
        fp8_unit=has_fp8_unit(input.device), **how,
    )  # fmt: skip
    rows, table = (input, residual, total, out), "add" if added else TABLES[quant]
    written = IN_PLACE if in_place else TOTAL_IN_PLACE if added and total is residual else NOTHING
    return bind_rows(rms_kernel, table, recipe, rows, [weight], pdl=enable_pdl, in_place=written)


def bind_rmsnorm(
    input: Tensor, weight: Tensor | None, eps: float, numerics: str, gemma: bool, variance_size: int | None,
    enable_pdl: bool | None,
) -> Bound:  # fmt: skip
    new_output = maker_of_outputs(input)
    how = (NUMERICS[numerics], gemma, variance_size, enable_pdl)
    launch = bind(input, None, weight, new_output(input), None, *how)
    width = input.shape[-1]

    def run(input: Tensor, weight: Tensor | None, eps: float, *_: Any) -> Tensor:
        out = new_output(input)
        launch(out.numel() // width, eps, input, None, weight, out, None, None, None)
        return out

    return Bound(run, (launch,))


def bind_rmsnorm_out(
    input: Tensor, weight: Tensor | None, out: Tensor, eps: float, numerics: str, gemma: bool,
    variance_size: int | None, enable_pdl: bool | None,
) -> Bound:  # fmt: skip
    launch = bind(input, None, weight, out, None, NUMERICS[numerics], gemma, variance_size, enable_pdl)
    width = input.shape[-1]

    def run(input: Tensor, weight: Tensor | None, out: Tensor, eps: float, *_: Any) -> None:
        launch(input.numel() // width, eps, input, None, weight, out, None, None, None)

    return with_addresses(run, launch, width)


def bind_add_rmsnorm(
    input: Tensor, residual: Tensor, weight: Tensor | None, eps: float, numerics: str, gemma: bool,
    variance_size: int | None, enable_pdl: bool | None,
) -> Bound:  # fmt: skip
    new_output, new_total = maker_of_outputs(input), maker_of_outputs(residual)
    out, total = new_output(input), new_total(residual)
    launch = bind(input, residual, weight, out, total, NUMERICS[numerics], gemma, variance_size, enable_pdl)
    width = input.shape[-1]

    def run(input: Tensor, residual: Tensor, weight: Tensor | None, eps: float, *_: Any) -> tuple[Tensor, Tensor]:
        out, total = new_output(input), new_total(residual)
        launch(input.numel() // width, eps, input, residual, weight, out, total, None, None)
        return out, total

    return Bound(run, (launch,))


def bind_fused_add_rmsnorm(
    input: Tensor, residual: Tensor, weight: Tensor | None, eps: float, numerics: str, gemma: bool,
    variance_size: int | None, enable_pdl: bool | None,
) -> Bound:  # fmt: skip
    how = (NUMERICS[numerics], gemma, variance_size, enable_pdl)
    launch = bind(input, residual, weight, input, residual, *how, in_place=True)
    width = input.shape[-1]

    def run(input: Tensor, residual: Tensor, weight: Tensor | None, eps: float, *_: Any) -> None:
        launch(input.numel() // width, eps, input, residual, weight, input, residual, None, None)

    return with_addresses(run, launch, width)


def with_addresses(run: Callable[..., None], launch: Launch, width: int) -> Bound:
    """`run`, and the same by the addresses of its tensors. Their order is that of the kernel's pointers."""

    def at(placed: tuple[int, Sequence[int]], rest: tuple[Any, ...]) -> bool:
        elements, addresses = placed
        return launch.at(elements // width, rest[0], addresses)

    return Bound(run, (launch,), at)


def bind_l2norm(input: Tensor, eps: float, output_dtype: torch.dtype | None) -> Bound:
    new_output = maker_of_outputs(input)
    out = new_output(input, dtype=output_dtype)
    refuse_strange(out)
    launch = bind(input, None, None, out, None, NUMERICS["fp32"], l2=True)
    width = input.shape[-1]

    def run(input: Tensor, eps: float, output_dtype: torch.dtype | None) -> Tensor:
        out = new_output(input, dtype=output_dtype)
        launch(input.numel() // width, eps, input, None, None, out, None, None, None)
        return out

    return Bound(run, (launch,))


KERNELS: dict[str, Kernel] = {
    "rmsnorm": bind_rmsnorm,
    "rmsnorm_out": bind_rmsnorm_out,
    "add_rmsnorm": bind_add_rmsnorm,
    "fused_add_rmsnorm": bind_fused_add_rmsnorm,
    "l2norm": bind_l2norm,
}
