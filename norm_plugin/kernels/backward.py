"""The backward ops on their Triton kernels: which calls they refuse, and what is launched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from norm_plugin.kernels import Bound, Kernel, Refusal
from norm_plugin.kernels import backward_configs as configs
from norm_plugin.kernels.backward_kernel import backward_kernel
from norm_plugin.kernels.backward_parts import Recipe, Tile, statistics_kernel, sum_kernel
from norm_plugin.kernels.binding import layout, layout_or_refuse, refuse_strange
from norm_plugin.kernels.launch import KernelLaunch, gpu_of, processors, use_pdl
from norm_plugin.native.rms import new_output


def must_be_copied(grad: Tensor, beside: Tensor) -> bool:
    """Whether an incoming gradient must be copied first: autograd may send any strides (only zeros, for a sum)."""
    scattered = grad.shape[-1] > 1 and grad.stride(-1) != 1
    return scattered or layout([grad, beside]) is None


def dense_copy(t: Tensor) -> Tensor:
    """A copy with dense rows. Tensor.contiguous would not copy a single row, whose row stride may be anything."""
    return new_output(t).copy_(t)


def on_nvidia(device: torch.device) -> bool:
    """Whether a kernel may contain PTX and limit its registers."""
    return device.type == "cuda" and torch.version.hip is None


class Backward:
    """The launches of one signature: statistics of wide rows, gradients with partial sums, and the sum of the parts."""

    def __init__(
        self, grad: Tensor, x: Tensor, z: Tensor | None, added: Tensor | None, weight: Tensor | None,
        bias: Tensor | None, weight_grad: bool, bias_grad: bool, *, group: int | None = None, rms: bool = True,
        l2: bool = False, gemma: bool = False, gate_first: bool = False, sigmoid: bool = False,
    ) -> None:  # fmt: skip
        refuse_strange(x, z, weight, bias)
        self.copy_grad = must_be_copied(grad, x)
        self.copy_added = added is not None and must_be_copied(added, x)
        grad = dense_copy(grad) if self.copy_grad else grad
        added = dense_copy(added) if added is not None and self.copy_added else added
        refuse_strange(grad, added)
        self.width, self.size = x.shape[-1], x.shape[-1] if group is None else group
        self.groups = self.width // self.size
        self.weight = weight is not None and weight_grad
        self.bias = bias is not None and bias_grad
        table = "layer" if not rms else "gated" if z is not None else "add" if added is not None else "rms"
        gpu, pdl = gpu_of(x.device), use_pdl(None, x.device)
        made = self.config = configs.config(table, self.size, x.element_size(), gpu)
        self.most = max(1, processors(x.device) * made.programs // (self.groups * made.parts))
        dz = None if z is None else new_output(z)
        recipe = Recipe(
            groups=self.groups, rms=rms, l2=l2, gemma=gemma, gate_first=z is not None and gate_first,
            gate_last=z is not None and not gate_first, sigmoid=sigmoid,
        )  # fmt: skip
        rows = layout_or_refuse(grad, x, z, added, new_output(x), dz)
        tile = Tile(
            n=self.size, parts=made.parts, block=made.block, chunks=made.chunks, rows=made.rows, stages=made.stages,
            hold=made.hold, flat=made.flat, fence=on_nvidia(x.device), levels=rows.levels, align=rows.align, pdl=pdl,
        )  # fmt: skip
        self.rows = KernelLaunch(
            backward_kernel, made.warps, rows.integers, x.device, pdl, {"tile": tile, "recipe": recipe},
            lambda m: self.blocks(m) * self.groups * made.parts, made.registers if on_nvidia(x.device) else None,
        )  # fmt: skip
        self.statistics: KernelLaunch | None = None
        if made.parts > 1:
            block = configs.STATISTICS_WARPS * 32 * configs.VECTOR_BYTES // x.element_size()
            read = layout_or_refuse(grad, x, z)
            block, groups = min(block, made.block * made.parts), self.groups
            tile = tile._replace(block=block, rows=1, parts=1, levels=read.levels, align=read.align)
            how = {"tile": tile, "recipe": recipe, "UNROLL": configs.STATISTICS_UNROLL}
            self.statistics = KernelLaunch(
                statistics_kernel, configs.STATISTICS_WARPS, read.integers, x.device, pdl, how, lambda m: m * groups
            )
            self.planes = 2 if rms else 5
        columns = configs.SUM_COLUMNS if self.width <= configs.SUM_WIDE else configs.SUM_COLUMNS_WIDE
        sums = (self.weight + self.bias) * -(-self.width // columns)
        of = {"N": self.width, "COLUMNS": columns, "ROWS": configs.SUM_ROWS, "PDL": pdl}
        self.sum = KernelLaunch(sum_kernel, configs.SUM_WARPS, (), x.device, pdl, of, lambda m: sums)

    def bound(self, run: Callable[..., Any]) -> Bound:
        """`run`, and the launches that it uses."""
        return Bound(run, tuple(launch for launch in (self.rows, self.statistics, self.sum) if launch is not None))

    def blocks(self, m: int) -> int:
        """The number of blocks of consecutive rows. If no sum over rows is wanted, each tile is a block."""
        tiles = -(-m // self.config.rows)
        if not (self.weight or self.bias):
            return tiles
        return -(-tiles // -(-tiles // self.most))

    def __call__(
        self, grad: Tensor, x: Tensor, z: Tensor | None, added: Tensor | None, weight: Tensor | None,
        bias: Tensor | None, eps: float,
    ) -> list[Tensor]:  # fmt: skip
        grad = dense_copy(grad) if self.copy_grad else grad
        added = dense_copy(added) if added is not None and self.copy_added else added
        m = x.numel() // self.width
        dx, dz = new_output(x), None if z is None else new_output(z)
        dweight = None if not self.weight or weight is None else weight.new_empty(self.width)
        dbias = None if not self.bias or bias is None else bias.new_empty(self.width)
        found = [t for t in (dx, dz, dweight, dbias) if t is not None]
        if m == 0:
            return [t.zero_() for t in found]
        statistics = None
        if self.statistics is not None:
            statistics = x.new_empty((self.planes, m * self.groups), dtype=torch.float32)
            self.statistics(m, eps, grad, x, z, weight, statistics)
        blocks = self.blocks(m)
        weights = None if dweight is None else x.new_empty((blocks, self.width), dtype=torch.float32)
        biases = None if dbias is None else x.new_empty((blocks, self.width), dtype=torch.float32)
        self.rows(m, eps, grad, x, z, added, weight, bias, dx, dz, weights, biases, statistics)
        if weights is not None or biases is not None:
            self.sum(blocks, 0.0, weights, biases, dweight, dbias)
        return found


def bind_rmsnorm(
    grad: Tensor, input: Tensor, weight: Tensor | None, residual_grad: Tensor | None, eps: float, gemma: bool,
    variance_size: int | None, weight_grad: bool,
) -> Bound:  # fmt: skip
    if variance_size is not None:
        raise Refusal(f"the variance is of the first {variance_size} columns only")
    launches = Backward(grad, input, None, residual_grad, weight, None, weight_grad, False, gemma=gemma)
    return launches.bound(
        lambda grad, input, weight, residual_grad, eps, *_:
            launches(grad, input, None, residual_grad, weight, None, eps)
    )  # fmt: skip


def bind_l2norm(grad: Tensor, input: Tensor, eps: float) -> Bound:
    launches = Backward(grad, input, None, None, None, None, False, False, l2=True)
    return launches.bound(lambda grad, input, eps: launches(grad, input, None, None, None, None, eps)[0])


def bind_layernorm(
    grad: Tensor, input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, weight_grad: bool,
    bias_grad: bool,
) -> Bound:  # fmt: skip
    launches = Backward(grad, input, None, None, weight, bias, weight_grad, bias_grad, rms=False)
    return launches.bound(
        lambda grad, input, weight, bias, eps, *_: launches(grad, input, None, None, weight, bias, eps)
    )


def bind_gated_norm(
    grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, z: Tensor | None, eps: float,
    group_size: int | None, norm_before_gate: bool, is_rms_norm: bool, activation: str, weight_grad: bool,
    bias_grad: bool,
) -> Bound:  # fmt: skip
    launches = Backward(
        grad, x, z, None, weight, bias, weight_grad, bias_grad, group=group_size, rms=is_rms_norm,
        gate_first=not norm_before_gate, sigmoid=activation == "sigmoid",
    )  # fmt: skip
    return launches.bound(lambda grad, x, weight, bias, z, eps, *_: launches(grad, x, z, None, weight, bias, eps))


KERNELS: dict[str, Kernel] = {
    "rmsnorm_backward": bind_rmsnorm,
    "l2norm_backward": bind_l2norm,
    "layernorm_backward": bind_layernorm,
    "gated_norm_backward": bind_gated_norm,
}
