"""SGLang's gated norms: two functions that all their users call, in a Triton file each, and the class of Mixer2.

Our functions return new tensors. SGLang's `fused_norm_gate` writes into x and returns it, which no caller in SGLang
relies on; here x stays as it was.
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
from norm_plugin.engines.common import Answer, Forward, LeftToEngine, asked, replacement
from norm_plugin.engines.installed_hooks import InstalledHooks
from norm_plugin.numerics import ACTIVATIONS, TORCH_HF


def _replace_function(hook: str, ours: Callable[..., Answer], module: ModuleType, hooks: InstalledHooks) -> None:
    """Replace `rms_norm_gated` in its module, and in the modules that have imported it by name."""
    name, families = "rms_norm_gated", ("gated",)
    original = getattr(module, name, None)
    if not asked("gated") or not hooks.replace(hook, module, name, lambda f: replacement(hooks, families, f, ours)):
        return
    replaced = getattr(module, name)
    for other in [m for n, m in sys.modules.items() if n.startswith("sglang.")]:
        if other is not module and vars(other).get(name) is original:
            setattr(other, name, replaced)
            hooks.on_undo(partial(setattr, other, name, original))


def _layernorm_gated(
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
) -> Answer:
    for name, value in more.items():
        if value is not None:
            return LeftToEngine("gated_norm", f"an argument {name}")
    if activation not in ACTIVATIONS:
        return LeftToEngine("gated_norm", f"an activation {activation!r}")
    rows = _last_contiguous(x)
    if z is not None and z.shape != x.shape:  # [tokens, heads, N] beside [tokens * heads, N]
        rows = rows.reshape(z.shape)
    gate = None if z is None else _last_contiguous(z)
    out = calls.gated_norm(rows, weight, bias, gate, eps, group_size, norm_before_gate, is_rms_norm, activation)
    call_counts.count("gated_norm", x, weight)
    return out.reshape(x.shape)


def _last_contiguous(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def _fused_norm_gate(
    x: Tensor,
    g: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str = "swish",
    residual: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    eps: float = 1e-6,
) -> Answer:
    if residual is not None or prenorm or residual_in_fp32:
        return LeftToEngine("gated_norm", "a residual in a gated norm")
    if activation not in ACTIVATIONS:
        return LeftToEngine("gated_norm", f"an activation {activation!r}")
    rows = x.reshape(g.shape) if x.shape != g.shape else x
    out = calls.gated_norm(rows, weight, bias, g, eps, activation=activation)
    call_counts.count("gated_norm", x, weight)
    return out.reshape(x.shape)


#: sglang...fla.layernorm_gated, of Qwen3.5, Mamba2 and models like it, and Ling.
hook_layernorm_gated = partial(_replace_function, "layernorm_gated", _layernorm_gated)

#: sglang...fla.fused_norm_gate, of Qwen3-Next and Kimi: a function of the same name with other arguments.
hook_fused_norm_gate = partial(_replace_function, "fused_norm_gate", _fused_norm_gate)


def hook_mixer2(module: ModuleType, hooks: InstalledHooks, method: str) -> None:
    """Mixer2RMSNormGated. Its `forward_cuda` ends in layernorm_gated, which is hooked, or in `forward_native`."""
    if asked("mixer2"):
        in_layernorm_gated = method == "forward_cuda"

        def ours(original: Forward) -> Forward:
            return replacement(hooks, ("mixer2",), original, _mixer2(original, module, in_layernorm_gated))

        hooks.replace_method(module, "Mixer2RMSNormGated", method, ours)


def _mixer2(original: Forward, module: ModuleType, in_layernorm_gated: bool) -> Callable[..., Answer]:
    def forward(layer: Any, x: Tensor, gate: Tensor) -> Answer:
        if not layer.use_rms_norm:
            return LeftToEngine("gated_norm", "a gate without a norm")
        if layer.n_groups == 1 and layer.tp_size > 1:
            return _across_ranks(module, layer, x, gate)
        if layer.n_groups % layer.tp_size != 0:  # SGLang refuses models that would have such a layer
            return LeftToEngine("gated_norm", "groups of which some are spread over ranks")
        if in_layernorm_gated:
            answer: Tensor = original(layer, x, gate)
            return answer
        group = None if layer.n_groups == 1 else layer.group_size
        how = (layer.variance_epsilon, group, False, True, "silu", calls.numerics_in_place_of(TORCH_HF, x))
        normed = calls.gated_norm(x, layer.weight, None, gate, *how)
        call_counts.count("gated_norm", x, layer.weight)
        return normed

    return forward


def _across_ranks(module: ModuleType, layer: Any, x: Tensor, gate: Tensor) -> Tensor:
    """One group: SGLang adds up the sums of squares of all ranks, between two ops of ours."""
    for op in split.OPS:
        call_counts.count(op.name, x, layer.weight)
    of_attention = getattr(layer, "use_attn_tp_group", False)
    all_reduce = module.attn_tp_all_reduce if of_attention else module.tensor_model_parallel_all_reduce
    how = (layer.variance_epsilon, layer.tp_size, all_reduce)
    return split.rmsnorm_of_part(x, layer.weight, gate, *how, numerics=calls.numerics_in_place_of(TORCH_HF, x))
