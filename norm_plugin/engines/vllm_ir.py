"""Our RMSNorm as a provider of vLLM's IR: in compiled code it runs the norms that vLLM's fusion passes have left.

vLLM 0.26 to 0.33 have the IR. A provider is chosen by name, as in --ir-op-priority.rms_norm=norm_plugin; with
NORM_PLUGIN_SCOPE=all ours is the first choice.
"""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from norm_plugin import functions
from norm_plugin.engines import vllm_layers
from norm_plugin.engines.installed_hooks import InstalledHooks
from norm_plugin.engines.vllm_layers import DTYPES, native_numerics
from norm_plugin.numerics import FP32

PROVIDER = "norm_plugin"
OPS = ("rms_norm", "fused_add_rms_norm")


def numerics(x: Tensor, weight: Tensor | None) -> str:
    """The numerics of vLLM's native path; if Inductor fuses it, it rounds only once."""
    return FP32.name if vllm_layers.fused_by_inductor(x) else native_numerics(x, weight)


def rms_norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
    """vllm.ir.ops.rms_norm."""
    return functions.rmsnorm(x, weight, epsilon, numerics=numerics(x, weight))


def fused_add_rms_norm(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """vllm.ir.ops.fused_add_rms_norm, as a function."""
    return functions.add_rmsnorm(x, x_residual, weight, epsilon, numerics=numerics(x, weight))


def takes_norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> bool:
    """Whether ours takes this call. It is asked for traced tensors too, so it must not depend on a size."""
    return (
        variance_size is None
        and x.dtype in DTYPES
        and (weight is None or (weight.dim() == 1 and weight.dtype in (x.dtype, torch.float32)))
    )


def takes_add_norm(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> bool:
    """As takes_norm. vLLM writes the sum in x's dtype, ours in the residual's, so the two must be the same."""
    return takes_norm(x, weight, epsilon, variance_size) and x_residual.dtype == x.dtype


def install(hooks: InstalledHooks, first: bool) -> None:
    """Register the provider; with `first`, make it the first choice unless the user has named another."""
    ops = importlib.import_module("vllm.ir").ops
    for name, ours, takes in zip(OPS, (rms_norm, fused_add_rms_norm), (takes_norm, takes_add_norm), strict=True):
        op = getattr(ops, name)
        op.register_impl(PROVIDER, supports_args=takes)(ours)
        hooks.on_undo(partial(op.impls.pop, PROVIDER, None))
        hooks.live[f"ir.{name}"] = PROVIDER if first else f"{PROVIDER} (if chosen)"
    if first:
        platform = type(importlib.import_module("vllm.platforms").current_platform)
        hooks.replace("ir priority", platform, "get_default_ir_op_priority", _ours_first)


def _ours_first(original: Callable[..., Any]) -> Any:
    def get_default_ir_op_priority(cls: Any, vllm_config: Any) -> Any:
        priority = original(vllm_config)
        for name in OPS:
            setattr(priority, name, [PROVIDER, *getattr(priority, name)])
        return priority

    return classmethod(get_default_ir_op_priority)
