"""SGLang's gated norms: two Triton files with one function each that all their users call, and Mixer2's class.

The functions return new tensors. SGLang's `fused_norm_gate` writes into x instead and returns that, which no caller in
SGLang counts on: x stays as it was here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

from torch import Tensor

from norm_plugin import split
from norm_plugin.engines import call_counts, calls
from norm_plugin.engines.common import asked, or_declined, refused, traced
from norm_plugin.engines.installed_hooks import Record
from norm_plugin.engines.sglang_norms import Forward
from norm_plugin.numerics import ACTIVATIONS, TORCH_HF


def _everywhere(module: ModuleType, record: Record, hook: str, name: str, make: Callable[[Forward], Forward]) -> None:
    """Replace a function in its module, and wherever it was imported by name before we came."""
    original = getattr(module, name, None)
    if not record.replace(hook, module, name, make):
        return
    ours = getattr(module, name)
    for other in [m for n, m in sys.modules.items() if n.startswith("sglang.")]:
        if other is not module and vars(other).get(name) is original:
            setattr(other, name, ours)
            record.on_undo(partial(setattr, other, name, original))


def _ours(make: Callable[[Forward, Record], Forward], record: Record, original: Forward) -> Forward:
    return or_declined(original, make(original, record))


def hook_layernorm_gated(module: ModuleType, record: Record) -> None:
    """sglang...fla.layernorm_gated: Qwen3.5, Mamba2 and its family, Ling."""
    if asked("gated"):
        _everywhere(module, record, "layernorm_gated", "rms_norm_gated", partial(_ours, _layernorm_gated, record))


def _layernorm_gated(original: Forward, record: Record) -> Forward:
    def rms_norm_gated(
        *,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        z: Tensor | None = None,
        eps: float = 1e-6,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        is_rms_norm: bool = False,
        activation: str = "swish",
        **more: Any,
    ) -> Any:
        how: dict[str, Any] = {
            "eps": eps, "group_size": group_size, "norm_before_gate": norm_before_gate, "activation": activation,
        }  # fmt: skip
        reason = f"an activation {activation!r}" if activation not in ACTIVATIONS else ""
        reason = next((f"an argument {name}" for name, value in more.items() if value is not None), reason)
        if traced() or not record.live or reason:
            if reason and not traced():
                refused("gated_norm", x, weight, reason)
            return original(x=x, weight=weight, bias=bias, z=z, is_rms_norm=is_rms_norm, **how, **more)
        rows = _last_contiguous(x)
        if z is not None and z.shape != x.shape:  # [tokens, heads, N] beside [tokens * heads, N]
            rows = rows.reshape(z.shape)
        gate = None if z is None else _last_contiguous(z)
        out = calls.gated_norm(rows, weight, bias, gate, is_rms_norm=is_rms_norm, **how)
        call_counts.count("gated_norm", x, weight)
        return out.reshape(x.shape)

    return rms_norm_gated


def _last_contiguous(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def hook_fused_norm_gate(module: ModuleType, record: Record) -> None:
    """sglang...fla.fused_norm_gate: Qwen3-Next, Kimi. Another function of the same name, with other arguments."""
    if asked("gated"):
        _everywhere(module, record, "fused_norm_gate", "rms_norm_gated", partial(_ours, _fused_norm_gate, record))


def _fused_norm_gate(original: Forward, record: Record) -> Forward:
    def rms_norm_gated(
        x: Tensor,
        g: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        activation: str = "swish",
        residual: Tensor | None = None,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
        eps: float = 1e-6,
    ) -> Any:
        reason = ""
        if residual is not None or prenorm or residual_in_fp32:
            reason = "a residual in a gated norm"
        elif activation not in ACTIVATIONS:
            reason = f"an activation {activation!r}"
        if traced() or not record.live or reason:
            if reason and not traced():
                refused("gated_norm", x, weight, reason)
            return original(x, g, weight, bias, activation, residual, prenorm, residual_in_fp32, eps)
        rows = x.reshape(g.shape) if x.shape != g.shape else x
        out = calls.gated_norm(rows, weight, bias, g, eps, activation=activation)
        call_counts.count("gated_norm", x, weight)
        return out.reshape(x.shape)

    return rms_norm_gated


def hook_mixer2(module: ModuleType, record: Record, method: str) -> None:
    """Mixer2RMSNormGated: its `forward_cuda` ends in layernorm_gated or in `forward_native`."""
    if asked("mixer2"):
        make = partial(_mixer2, module, method == "forward_cuda")
        owner = getattr(module, "Mixer2RMSNormGated", None)
        if owner is None:
            record.missed("Mixer2RMSNormGated", f"{module.__name__} has no Mixer2RMSNormGated")
        else:
            record.replace("Mixer2RMSNormGated", owner, method, lambda f: or_declined(f, make(f, record)))


def _not_ours(layer: Any) -> str:
    if not layer.use_rms_norm:
        return "a gate without a norm"
    if layer.tp_size > 1 and layer.n_groups % layer.tp_size != 0:
        return "groups of which some are spread over ranks"  # SGLang refuses models that would have such a layer
    return ""


def _is_across_ranks(layer: Any) -> bool:
    return bool(layer.use_rms_norm and layer.n_groups == 1 and layer.tp_size > 1)


def _across_ranks(module: ModuleType, layer: Any, x: Tensor, gate: Tensor) -> Tensor:
    """One group: the sums of squares of all ranks are added up between two ops, as SGLang adds them up."""
    for op in split.OPS:
        call_counts.count(op.name, x, layer.weight)
    of_attention = getattr(layer, "use_attn_tp_group", False)
    all_reduce = module.attn_tp_all_reduce if of_attention else module.tensor_model_parallel_all_reduce
    how = (layer.variance_epsilon, layer.tp_size, all_reduce)
    return split.rmsnorm_of_part(x, layer.weight, gate, *how, numerics=calls.numerics_in_place_of(TORCH_HF, x))


def _mixer2(module: ModuleType, in_layernorm_gated: bool, original: Forward, record: Record) -> Forward:
    """`in_layernorm_gated`: the method ends in that function, where it is taken."""

    def forward(self: Any, x: Tensor, gate: Tensor) -> Any:
        if traced() or not record.live:
            return original(self, x, gate)
        if _is_across_ranks(self):
            return _across_ranks(module, self, x, gate)
        reason = _not_ours(self)
        if reason:
            refused("gated_norm", x, self.weight, reason)
        if reason or in_layernorm_gated:
            return original(self, x, gate)
        group = None if self.n_groups == 1 else self.group_size
        how = (self.variance_epsilon, group, False, True, "silu", calls.numerics_in_place_of(TORCH_HF, x))
        normed = calls.gated_norm(x, self.weight, None, gate, *how)
        call_counts.count("gated_norm", x, self.weight)
        return normed

    return forward
