"""The classes of sglang.srt.layers.layernorm, taken where SGLang dispatches to: what each computes, on which platform.

`forward_cuda` updates a residual in place and returns the same two tensors; `forward_native`, which SGLang runs on a
CPU, returns new ones. Whoever takes one keeps its contract.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from norm_plugin.engines import call_counts, calls, qk_norms
from norm_plugin.engines.common import asked, or_declined, refused, traced, widened_sum
from norm_plugin.engines.installed_hooks import Record
from norm_plugin.numerics import FP32, HF, TORCH, VLLM_C

Forward = Callable[..., Any]

Make = Callable[[Forward, ModuleType, bool, Record], Forward]

#: Class, the families of which its layers may be, and who makes the replacement.
CLASSES: list[tuple[str, tuple[str, ...], Make]] = []


def _taken(cls: str, *families: str) -> Callable[[Make], Make]:
    def enter(make: Make) -> Make:
        CLASSES.append((cls, families, make))
        return make

    return enter


def hook(module: ModuleType, record: Record, method: str) -> None:
    """Take `method` of every class that the module has."""
    in_place = method == "forward_cuda"
    for cls, families, make in CLASSES:
        if not any(map(asked, families)):
            continue
        owner = getattr(module, cls, None)
        if owner is None:
            record.missed(cls, f"{module.__name__} has no {cls}")
            continue

        def replacement(original: Forward, make: Make = make, families: tuple[str, ...] = families) -> Forward:
            ours = make(original, module, in_place, record)
            return _only_asked(families, original, or_declined(original, ours))

        record.replace(cls, owner, method, replacement)
        if hasattr(owner, "enter_torch_compile"):
            record.replace(f"{cls} under torch.compile", owner, "enter_torch_compile", _count_compiled)


def _count_compiled(original: Forward) -> Forward:
    """SGLang switches its layers to their PyTorch for what it compiles: from then on nobody can count their calls."""

    def enter_torch_compile(self: Any, *args: Any, **named: Any) -> Any:
        weight = getattr(self, "weight", None)
        if weight is not None and not self.is_torch_compile:
            call_counts.count(
                "layernorm" if hasattr(self, "bias") else "rmsnorm", weight, weight, "left to torch.compile"
            )
        return original(self, *args, **named)

    return enter_torch_compile


def _only_asked(families: tuple[str, ...], original: Forward, ours: Forward) -> Forward:
    """Ours for the layers of the families that are asked for."""
    left_out = [family for family in families if not asked(family)]
    if not left_out:
        return ours

    def forward(self: Any, *args: Any, **named: Any) -> Any:
        return (original if qk_norms.family(self, families[0]) in left_out else ours)(self, *args, **named)

    return forward


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
    """The norm of (x + residual) + addition, of which nothing is rounded before the end; new tensors."""
    out, total = calls.add_rmsnorm(addition, widened_sum(x, residual), weight, eps, numerics)
    return out, total.to(x.dtype)


@_taken("RMSNorm", "rmsnorm", "qknorm")
def _rmsnorm(original: Forward, module: ModuleType, in_place: bool, record: Record) -> Forward:
    later = tuple(inspect.signature(original).parameters)[4:]  # self, x, residual, post_residual_addition, ...
    invariant: Callable[[], bool] = module.is_batch_invariant_mode_enabled
    quantised_scale: Callable[[Any], Any] = getattr(module, "_fp8_static_input_scale", lambda linear: linear)
    may_quantise = hasattr(module.RMSNorm, "_quant_linear")  # a missing attribute of a layer takes long to miss

    def why_not(layer: Any, x: Tensor, addition: Tensor | None, native: bool, more: dict[str, Any]) -> str:
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

    def forward(
        self: Any,
        x: Tensor,
        residual: Tensor | None = None,
        post_residual_addition: Tensor | None = None,
        *positional: Any,
        **named: Any,
    ) -> Any:
        if traced() or not record.live:
            return original(self, x, residual, post_residual_addition, *positional, **named)
        native = not in_place or invariant()  # with SGLang's order of additions
        three = native and residual is not None and post_residual_addition is not None
        op = _op(residual, in_place and not three)
        weight = self.weight
        more = dict(zip(later, positional, strict=False)) | named if positional or named else {}
        reason = "no rows" if x.numel() == 0 else why_not(self, x, post_residual_addition, native, more)
        if reason:
            if reason == "no rows":
                call_counts.count(op, x, weight, reason)
            else:
                refused(op, x, weight, reason)
            return original(self, x, residual, post_residual_addition, *positional, **named)
        eps, numerics = self.variance_epsilon, HF.name if self.cast_x_before_out_mul else FP32.name
        if residual is None:
            answer: Any = calls.rmsnorm(x, weight, eps, numerics)
        elif three and post_residual_addition is not None:
            answer = _add_three_and_norm(x, residual, post_residual_addition, weight, eps, numerics)
        else:
            if post_residual_addition is not None:
                residual = residual + post_residual_addition
            answer = _add_norm(x, residual, weight, eps, numerics, False, in_place)
        call_counts.count(op, x, weight)
        return answer

    return forward


def _gemma(epsilon: str, with_addition: bool) -> Make:
    """GemmaRMSNorm and Gemma3RMSNorm. Their kernels normalize the sum as it is, their PyTorch the rounded one."""

    def make(original: Forward, module: ModuleType, in_place: bool, record: Record) -> Forward:
        numerics = FP32.name if in_place else VLLM_C.name

        def forward(self: Any, x: Tensor, residual: Tensor | None = None, *positional: Any, **named: Any) -> Any:
            if traced() or not record.live:
                return original(self, x, residual, *positional, **named)
            op, weight = _op(residual, in_place), self.weight
            more = dict(zip(("post_residual_addition",), positional, strict=False)) | named
            addition = more.pop("post_residual_addition", None) if with_addition else None
            unknown = [name for name, value in more.items() if value is not None]
            if unknown:
                refused(op, x, weight, f"an argument {unknown[0]}")
                return original(self, x, residual, *positional, **named)
            eps = getattr(self, epsilon)
            if residual is None:
                answer: Any = calls.rmsnorm(x, weight, eps, gemma=True)
            else:
                total = residual if addition is None else residual + addition
                answer = _add_norm(x, total, weight, eps, numerics, True, in_place)
            call_counts.count(op, x, weight)
            return answer

        return forward

    return make


_taken("GemmaRMSNorm", "gemma", "qknorm")(_gemma("variance_epsilon", with_addition=True))
_taken("Gemma3RMSNorm", "gemma", "qknorm")(_gemma("eps", with_addition=False))


@_taken("Gemma4RMSNorm", "gemma", "qknorm")
def _gemma4(original: Forward, module: ModuleType, in_place: bool, record: Record) -> Forward:
    def forward(self: Any, x: Tensor) -> Any:
        if traced() or not record.live:
            return original(self, x)
        weight = self.weight if self.with_scale else None
        if weight is not None and self.scale_shift not in (0.0, 1.0):
            refused("rmsnorm", x, weight, f"a weight shifted by {self.scale_shift}")
            return original(self, x)
        normed = calls.rmsnorm(x, weight, self.eps, gemma=weight is not None and self.scale_shift == 1.0)
        call_counts.count("rmsnorm", x, weight)
        return normed

    return forward


@_taken("RMSNormWithoutScale", "rmsnorm", "qknorm")
def _without_scale(original: Forward, module: ModuleType, in_place: bool, record: Record) -> Forward:
    def forward(self: Any, x: Tensor) -> Any:
        if traced() or not record.live:
            return original(self, x)
        normed = calls.rmsnorm(x, None, self.eps)
        call_counts.count("rmsnorm", x, None)
        return normed

    return forward


@_taken("LayerNorm", "layernorm")
def _layernorm(original: Forward, module: ModuleType, in_place: bool, record: Record) -> Forward:
    def forward(self: Any, x: Tensor) -> Any:
        if traced() or not record.live:
            return original(self, x)
        weight = self.weight if self.elementwise_affine else None
        bias = self.bias if self.use_bias else None
        if torch.promote_types(x.dtype, self.dtype) != self.dtype:
            refused("layernorm", x, weight, f"x is rounded to {self.dtype} before it is normalized")
            return original(self, x)
        numerics = FP32.name if in_place else calls.numerics_in_place_of(TORCH, x)
        normed = calls.layernorm(x, weight, bias, self.variance_epsilon, numerics)
        call_counts.count("layernorm", x, weight)
        return normed

    return forward
