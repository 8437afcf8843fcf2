"""The norm classes of sglang.srt.layers.layernorm: what runs instead of the method that SGLang calls on this machine.

`forward_cuda` updates a residual in place and returns the same two tensors. `forward_native`, which SGLang runs on a
CPU, returns new tensors. A replacement does the same.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from functools import partial, wraps
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from norm_plugin.engines import call_counts, calls
from norm_plugin.engines.common import Answer, Forward, LeftToEngine, asked, replacement
from norm_plugin.engines.installed_hooks import InstalledHooks
from norm_plugin.engines.model_layers import Why
from norm_plugin.native.rms import wide
from norm_plugin.numerics import FP32, HF, TORCH, VLLM_C

#: Makes the replacement of a method, from the method, SGLang's module, and whether the method writes in place.
Make = Callable[[Forward, ModuleType, bool], Callable[..., Answer]]


def hook(module: ModuleType, hooks: InstalledHooks, method: str) -> None:
    """Replace `method` of each class of the module that NORM_PLUGIN_OPS asks for."""
    in_place = method == "forward_cuda"
    for cls, (families, make) in CLASSES.items():
        if not any(map(asked, families)):
            continue

        def ours(original: Forward, make: Make = make, families: tuple[str, ...] = families) -> Forward:
            return replacement(hooks, families, original, make(original, module, in_place))

        if hooks.replace_method(module, cls, method, ours) and hasattr(getattr(module, cls), "enter_torch_compile"):
            hooks.replace(f"{cls} under torch.compile", getattr(module, cls), "enter_torch_compile", _count_compiled)


def _count_compiled(original: Forward) -> Forward:
    """Counts a layer that SGLang switches to PyTorch for torch.compile: its later calls cannot be counted."""

    @wraps(original)
    def enter_torch_compile(layer: Any, *args: Any, **named: Any) -> Any:
        weight = getattr(layer, "weight", None)
        if weight is not None and not layer.is_torch_compile:  # a layer may be shared
            op = "layernorm" if hasattr(layer, "bias") else "rmsnorm"
            call_counts.count(op, weight, weight, "left to torch.compile")
        return original(layer, *args, **named)

    return enter_torch_compile


def _op(residual: Tensor | None, in_place: bool) -> str:
    return "rmsnorm" if residual is None else "fused_add_rmsnorm" if in_place else "add_rmsnorm"


def _add_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, numerics: str, gemma: bool, in_place: bool
) -> tuple[Tensor, Tensor]:
    if not in_place:
        return calls.add_rmsnorm(x, residual, weight, eps, numerics, gemma)
    calls.fused_add_rmsnorm(x, residual, weight, eps, numerics, gemma)
    return x, residual


def _add_three_and_norm(
    x: Tensor, residual: Tensor, addition: Tensor, weight: Tensor, eps: float, numerics: str
) -> tuple[Tensor, Tensor]:
    """The norm of (x + residual) + addition, rounded only at the end, and that sum; new tensors."""
    out, total = calls.add_rmsnorm(addition, wide(x) + wide(residual), weight, eps, numerics)
    return out, total.to(x.dtype)


def _refusal(module: ModuleType, in_place: bool) -> Callable[..., str]:
    """Makes the function that says why a call of RMSNorm is left to SGLang."""
    quantised_scale: Callable[[Any], Any] = getattr(module, "_fp8_static_input_scale", lambda linear: linear)
    may_quantise = hasattr(module.RMSNorm, "_quant_linear")  # looking up a missing attribute of a layer is slow

    def why_not(layer: Any, x: Tensor, addition: Tensor | None, native: bool, more: dict[str, Any]) -> str:
        if x.numel() == 0:
            return "no rows"
        if layer.variance_size_override is not None:
            return "the variance of part of a row"
        if layer.fp32_residual:
            return "an fp32 residual"
        if layer.override_orig_dtype is not None:
            return "an output of another dtype"
        if native and in_place and module.get_exec().deterministic.rl_on_policy_target == "fsdp":
            return "on-policy training wants the bits of its trainer"
        linear = more.pop("quant_linear", None)
        if linear is None and may_quantise:
            linear = layer._quant_linear
        if linear is not None and quantised_scale(linear) is not None:
            return "SGLang quantises in its norm"
        for name, value in more.items():
            if value is not None:
                return f"an argument {name}"
        if layer.cast_x_before_out_mul:
            if layer.weight.dtype != x.dtype:
                return "rounded before a weight of another dtype"
            if addition is not None and not native:
                return "post_residual_addition, rounded before the weight"
        return ""

    return why_not


def _numerics(layer: Any) -> str:
    return HF.name if layer.cast_x_before_out_mul else FP32.name


def _gemma_numerics(in_place: bool) -> str:
    """SGLang's kernels normalize the exact sum, its PyTorch the rounded one."""
    return FP32.name if in_place else VLLM_C.name


def _rmsnorm(original: Forward, module: ModuleType, in_place: bool) -> Callable[..., Answer]:
    later = tuple(inspect.signature(original).parameters)[4:]  # after self, x, residual, post_residual_addition
    invariant: Callable[[], bool] = module.is_batch_invariant_mode_enabled
    why_not = _refusal(module, in_place)

    def forward(
        layer: Any,
        x: Tensor,
        residual: Tensor | None = None,
        post_residual_addition: Tensor | None = None,
        *positional: Any,
        **named: Any,
    ) -> Answer:
        native = not in_place or invariant()  # SGLang then adds in another order
        three = native and residual is not None and post_residual_addition is not None
        op = _op(residual, in_place and not three)
        more = dict(zip(later, positional, strict=False)) | named if positional or named else {}
        if reason := why_not(layer, x, post_residual_addition, native, more):
            return LeftToEngine(op, reason)
        weight, eps, numerics = layer.weight, layer.variance_epsilon, _numerics(layer)
        answer: Answer
        if residual is None:
            answer = calls.rmsnorm(x, weight, eps, numerics)
        elif three and post_residual_addition is not None:
            answer = _add_three_and_norm(x, residual, post_residual_addition, weight, eps, numerics)
        else:
            if post_residual_addition is not None:
                residual = residual + post_residual_addition
            answer = _add_norm(x, residual, weight, eps, numerics, False, in_place)
        call_counts.count(op, x, weight)
        return answer

    return forward


def _gemma(
    original: Forward, module: ModuleType, in_place: bool, epsilon: str, with_addition: bool
) -> Callable[..., Answer]:
    """GemmaRMSNorm and Gemma3RMSNorm."""
    numerics = _gemma_numerics(in_place)

    def forward(layer: Any, x: Tensor, residual: Tensor | None = None, *positional: Any, **named: Any) -> Answer:
        op, weight, eps = _op(residual, in_place), layer.weight, getattr(layer, epsilon)
        more = dict(zip(("post_residual_addition",), positional, strict=False)) | named
        addition = more.pop("post_residual_addition", None) if with_addition else None
        unknown = [name for name, value in more.items() if value is not None]
        if unknown:
            return LeftToEngine(op, f"an argument {unknown[0]}")
        answer: Answer
        if residual is None:
            answer = calls.rmsnorm(x, weight, eps, gemma=True)
        else:
            total = residual if addition is None else residual + addition
            answer = _add_norm(x, total, weight, eps, numerics, True, in_place)
        call_counts.count(op, x, weight)
        return answer

    return forward


def _gemma4(layer: Any, x: Tensor) -> Answer:
    weight = layer.weight if layer.with_scale else None
    if weight is not None and layer.scale_shift not in (0.0, 1.0):
        return LeftToEngine("rmsnorm", f"a weight shifted by {layer.scale_shift}")
    normed = calls.rmsnorm(x, weight, layer.eps, gemma=weight is not None and layer.scale_shift == 1.0)
    call_counts.count("rmsnorm", x, weight)
    return normed


def _without_scale(layer: Any, x: Tensor) -> Answer:
    normed = calls.rmsnorm(x, None, layer.eps)
    call_counts.count("rmsnorm", x, None)
    return normed


def _layernorm(original: Forward, module: ModuleType, in_place: bool) -> Callable[..., Answer]:
    def forward(layer: Any, x: Tensor) -> Answer:
        weight = layer.weight if layer.elementwise_affine else None
        bias = layer.bias if layer.use_bias else None
        if torch.promote_types(x.dtype, layer.dtype) != layer.dtype:
            return LeftToEngine("layernorm", f"x is rounded to {layer.dtype} before it is normalized")
        numerics = FP32.name if in_place else calls.numerics_in_place_of(TORCH, x)
        normed = calls.layernorm(x, weight, bias, layer.variance_epsilon, numerics)
        call_counts.count("layernorm", x, weight)
        return normed

    return forward


class How(NamedTuple):
    """How a norm that completes an all-reduce is done: as the same norm is without one."""

    numerics: str
    gemma: bool


def at_seam(model: nn.Module, x: Tensor, in_place: bool, why: Why) -> dict[nn.Module, How | str]:
    """The norms of a model that SGLang may have complete an all-reduce of rows like x: how, or why they stay its own.

    `why` says why a layer has no hook.
    """
    module = importlib.import_module("sglang.srt.layers.layernorm")
    refusal = _refusal(module, in_place)

    def how(layer: Any) -> How | str:
        if reason := why(layer):
            return reason
        if isinstance(layer, module.GemmaRMSNorm):
            return How(_gemma_numerics(in_place), gemma=True)
        native = not in_place or module.is_batch_invariant_mode_enabled()
        return refusal(layer, x, None, native, {}) or How(_numerics(layer), gemma=False)

    return {layer: how(layer) for layer in model.modules() if hasattr(layer, "forward_with_allreduce_fusion")}


#: By class: the families that its layers may belong to (the first, unless they are norms of q and k), and the maker.
CLASSES: dict[str, tuple[tuple[str, ...], Make]] = {
    "RMSNorm": (("rmsnorm", "qknorm"), _rmsnorm),
    "GemmaRMSNorm": (("gemma", "qknorm"), partial(_gemma, epsilon="variance_epsilon", with_addition=True)),
    "Gemma3RMSNorm": (("gemma", "qknorm"), partial(_gemma, epsilon="eps", with_addition=False)),
    "Gemma4RMSNorm": (("gemma", "qknorm"), lambda *how: _gemma4),
    "RMSNormWithoutScale": (("rmsnorm", "qknorm"), lambda *how: _without_scale),
    "LayerNorm": (("layernorm",), _layernorm),
}
