"""The public functions, with the signatures that people already call.

Each has two doors. Where only values are wanted, the call goes straight to `dispatch.call`, which costs a few
microseconds less than torch's dispatcher; where it is traced, transformed or differentiated, through torch.ops.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from norm_plugin import checks, dispatch, gradients, ops, shortcut  # noqa: F401 - gradients gives the ops theirs
from norm_plugin.dispatch import Op
from norm_plugin.numerics import FP32

_PLAIN = (Tensor, Parameter)
_is_traced = torch.compiler.is_dynamo_compiling  # by a name of this module: finding it takes as long as asking it


def _needs_grad(*tensors: Tensor | None) -> bool:
    if torch.is_grad_enabled():
        for t in tensors:
            if getattr(t, "requires_grad", False):  # what is no tensor is refused by torch's schema
                return True
    return False


def _only_values(*tensors: Tensor | None) -> bool:
    """Whether nothing traces, transforms or differentiates a call on these tensors, and all of them are plain numbers
    in memory."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    ):
        return False
    return all(t is None or _is_plain(t) for t in tensors) and not _needs_grad(*tensors)


def _is_plain(t: Tensor) -> bool:
    """Whether the values are those in memory. torch's dispatcher makes them so for the others (those with a negative
    bit, lazy zeros), and answers calls on meta tensors."""
    return type(t) in _PLAIN and not (t.is_neg() or t._is_zerotensor() or t.is_meta)


def _derived() -> bool:
    """Whether torch.func differentiates what is called, or forward mode does: the ops have no formulas for that, and
    the native ones need none."""
    if torch.compiler.is_compiling():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return any(transform.key() in _DERIVING for transform in torch._C._functorch.get_interpreter_stack() or ())
    return forward_ad._current_level >= 0


_DERIVING = (torch._C._functorch.TransformType.Grad, torch._C._functorch.TransformType.Jvp)


def call(
    op: Op,
    tensors: tuple[Tensor | None, ...],
    rest: tuple[Any, ...],
    recorded: Callable[..., Any] | None = None,
    decline: bool = False,
) -> Any:
    """`op` on its tensors and its other arguments, by the shortest way that is right.

    An op that writes has no autograd formula: `recorded` does the same where a gradient is wanted. `decline`:
    raise dispatch.Declined, before anything is written, where a kernel was asked for and none can do the call.
    """
    if not _is_traced() and forward_ad._current_level < 0:
        found = shortcut.find(op, tensors, rest)
        if found is not None:
            route, agreed = found
            if route.writes:
                dispatch.advance_versions(route.written(tensors))
            route.calls += 1
            try:
                if route.at is not None and route.at(agreed, rest):
                    return None
                return route.run(*tensors, *rest)
            except Exception as error:
                return dispatch.after_failure(route, error, (*tensors, *rest), decline)
    args = (*tensors, *rest)
    if _derived():
        return dispatch.run(dispatch.find_native(op, args, "torch.func or forward-mode differentiation"), args)
    if op.written and _needs_grad(*tensors):
        return _recorded_writing(op, args, recorded)
    if not _only_values(*tensors):
        if op.written and not torch.compiler.is_compiling():
            args = (*_resolved(op, tensors), *rest)
        return getattr(torch.ops.norm_plugin, op.name)(*args)
    route = dispatch.find_route(op, args)
    result = dispatch.run(route, args, decline)
    if route.backend == "triton" and route.proven:
        shortcut.remember(op, tensors, rest, route)
    return result


def _resolved(op: Op, tensors: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """The tensors without a negative bit, which torch can resolve only for ops that return what they write."""
    for i in op.written:
        t = tensors[i]
        if isinstance(t, Tensor) and t.is_neg():
            name = op.arguments[i]
            raise ValueError(f"{name} has the negative bit, and it is written in place; pass {name}.resolve_neg().")
    return [t.resolve_neg() if isinstance(t, Tensor) else t for t in tensors]


def _recorded_writing(op: Op, args: tuple[Any, ...], recorded: Callable[..., Any] | None) -> Any:
    """An op that writes, where gradients are recorded: nothing is written before it is known that all can be."""
    op.check(args)
    written = [(op.arguments[i], args[i]) for i in op.written if args[i] is not None]
    if not torch.compiler.is_compiling() and all(_is_plain(t) for _, t in written):  # only real tensors can tell
        op.check_memory(args)
        for name, t in written:
            checks.recorded_writing(name, t)
    if recorded is not None:
        return recorded(*args)
    for name, t in written:
        if t.requires_grad:
            raise RuntimeError(
                f"{name} requires a gradient, and {op.name}, which writes it, has none; call it under torch.no_grad()."
            )
    return getattr(torch.ops.norm_plugin, op.name)(*args)


def _recorded_out(input: Tensor, weight: Tensor | None, out: Tensor, *how: Any) -> None:
    kept = input.clone()  # what the gradient needs must not change, and out may be the input
    out.copy_(call(ops.RMSNORM, (kept, weight), how))


def recorded_add(input: Tensor, residual: Tensor, weight: Tensor | None, *how: Any) -> None:
    out, new_residual = torch.ops.norm_plugin.add_rmsnorm(input, residual, weight, *how)
    input.copy_(out)
    residual.copy_(new_residual)


def rmsnorm(
    input: Tensor,
    weight: Tensor | None,
    eps: float = 1e-6,
    out: Tensor | None = None,
    enable_pdl: bool | None = None,
    *,
    numerics: str = FP32.name,
    gemma: bool = False,
    variance_size: int | None = None,
) -> Tensor:
    """input / rms(input) * weight, row by row, the rms of the first `variance_size` columns. `out` may be `input`."""
    how = (eps, numerics, gemma, variance_size, enable_pdl)
    if out is None:
        result: Tensor = call(ops.RMSNORM, (input, weight), how)
        return result
    call(ops.RMSNORM_OUT, (input, weight, out), how, _recorded_out)
    return out


def gemma_rmsnorm(
    input: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    out: Tensor | None = None,
    enable_pdl: bool | None = None,
    *,
    numerics: str = FP32.name,
) -> Tensor:
    """rmsnorm with 1 + weight, added in fp32. `out` may be `input` itself."""
    return rmsnorm(input, weight, eps, out, enable_pdl, numerics=numerics, gemma=True)


def fused_add_rmsnorm(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float = 1e-6,
    enable_pdl: bool | None = None,
    *,
    numerics: str = FP32.name,
) -> None:
    """residual += input; input = rmsnorm(residual). Both in place."""
    how = (eps, numerics, False, None, enable_pdl)
    call(ops.FUSED_ADD_RMSNORM, (input, residual, weight), how, recorded_add)


def gemma_fused_add_rmsnorm(
    input: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    enable_pdl: bool | None = None,
    *,
    numerics: str = FP32.name,
) -> None:
    """fused_add_rmsnorm with 1 + weight, added in fp32. Both in place."""
    how = (eps, numerics, True, None, enable_pdl)
    call(ops.FUSED_ADD_RMSNORM, (input, residual, weight), how, recorded_add)


def add_rmsnorm(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float = 1e-6,
    *,
    numerics: str = FP32.name,
    gemma: bool = False,
    variance_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(rmsnorm(input + residual), input + residual); nothing is changed in place."""
    tensors = (input, residual, weight)
    result: tuple[Tensor, Tensor] = call(ops.ADD_RMSNORM, tensors, (eps, numerics, gemma, variance_size, None))
    return result


def l2norm(x: Tensor, eps: float = 1e-6, output_dtype: torch.dtype | None = None) -> Tensor:
    """x / sqrt(sum(x^2) + eps), row by row."""
    result: Tensor = call(ops.L2NORM, (x,), (eps, output_dtype))
    return result


def layernorm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-6,
    *,
    numerics: str = FP32.name,
) -> Tensor:
    """(input - mean) / std * weight + bias, row by row."""
    tensors = (input, weight, bias)
    result: Tensor = call(ops.LAYERNORM, tensors, (eps, numerics))
    return result


def layernorm_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    eps: float = 1e-6,
) -> Tensor:
    """layernorm(x) @ linear_weight.T + linear_bias."""
    tensors = (x, weight, bias, linear_weight, linear_bias)
    result: Tensor = call(ops.LAYERNORM_LINEAR, tensors, (eps,))
    return result


def layernorm_fn(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
    activation: str = "silu",
    *,
    numerics: str = FP32.name,
) -> Tensor:
    """The norm of each group of each row, gated by act(z): after the norm, or before it."""
    tensors = (x, weight, bias, z)
    result: Tensor = call(
        ops.GATED_NORM, tensors, (eps, group_size, norm_before_gate, is_rms_norm, activation, numerics)
    )
    return result


def rmsnorm_fn(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    activation: str = "silu",
    *,
    numerics: str = FP32.name,
) -> Tensor:
    """layernorm_fn with RMSNorm."""
    return layernorm_fn(x, weight, bias, z, eps, group_size, norm_before_gate, True, activation, numerics=numerics)


def _scale(scale: Tensor | float, input: Tensor) -> Tensor:
    return scale if isinstance(scale, Tensor) else torch.tensor(scale, dtype=torch.float32, device=input.device)


def rmsnorm_quant(
    out: Tensor,
    input: Tensor,
    weight: Tensor | None,
    scale: Tensor | float,
    eps: float = 1e-6,
    enable_pdl: bool | None = None,
    *,
    numerics: str = FP32.name,
    gemma: bool = False,
) -> None:
    """out = rmsnorm(input) / scale, rounded and saturated to out's dtype (fp8 or int8)."""
    tensors = (out, input, weight, _scale(scale, input))
    call(ops.RMSNORM_QUANT, tensors, (eps, numerics, gemma, enable_pdl))


def fused_add_rmsnorm_quant(
    out: Tensor,
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    scale: Tensor | float,
    eps: float = 1e-6,
    enable_pdl: bool | None = None,
    *,
    numerics: str = FP32.name,
    gemma: bool = False,
) -> None:
    """residual += input, in place; out = rmsnorm(residual) / scale. input keeps its values."""
    tensors = (out, input, residual, weight, _scale(scale, input))
    call(ops.FUSED_ADD_RMSNORM_QUANT, tensors, (eps, numerics, gemma, enable_pdl))


def rmsnorm_dynamic_quant(
    input: Tensor,
    weight: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    quant_dtype: torch.dtype = torch.float8_e4m3fn,
    scale_ub: Tensor | None = None,
    *,
    numerics: str = FP32.name,
    gemma: bool = False,
) -> tuple[Tensor, Tensor]:
    """(rmsnorm(input) / scales, scales [..., 1]), one scale a row. A residual is added first and updated in place."""
    tensors = (input, weight, residual, scale_ub)
    result: tuple[Tensor, Tensor] = call(ops.RMSNORM_DYNAMIC_QUANT, tensors, (eps, quant_dtype, numerics, gemma, None))
    return result


def rmsnorm_block_quant(
    input: Tensor,
    weight: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int = 128,
    quant_dtype: torch.dtype = torch.float8_e4m3fn,
    *,
    numerics: str = FP32.name,
    gemma: bool = False,
) -> tuple[Tensor, Tensor]:
    """(rmsnorm(input) / scales, scales [..., N / group_size]). A residual is added first and updated in place."""
    tensors = (input, weight, residual)
    result: tuple[Tensor, Tensor] = call(
        ops.RMSNORM_BLOCK_QUANT, tensors, (eps, group_size, quant_dtype, numerics, gemma, None)
    )
    return result


def layernorm_quant(
    out: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | float,
    eps: float = 1e-6,
    *,
    numerics: str = FP32.name,
) -> None:
    """out = layernorm(input) / scale, rounded and saturated to out's dtype (fp8 or int8)."""
    tensors = (out, input, weight, bias, _scale(scale, input))
    call(ops.LAYERNORM_QUANT, tensors, (eps, numerics))
