"""The norm layers of vLLM on our ops: what each runs instead of its forward, and which calls it leaves to vLLM.

The numerics are those of the code that is replaced.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from norm_plugin import split
from norm_plugin.engines import call_counts, calls
from norm_plugin.engines.common import Answer, LeftToEngine, traced
from norm_plugin.numerics import FP32, HF, TORCH, TORCH_HF, VLLM_C

#: The dtypes of x that ours take; others are left to vLLM.
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def count(op: str, x: Tensor, weight: Tensor | None) -> None:
    """Count one call of ours. While a compiler traces it, nothing runs and nothing is counted."""
    if not traced():
        call_counts.count(op, x, weight)


#: Whether Inductor rounds the loaded model where eager code does (emulate_precision_casts).
rounds_as_eager = False


def fused_by_inductor(x: Tensor) -> bool:
    """Whether ours replaces code that Inductor compiles and rounds only once, at the end."""
    return (traced() or isinstance(x, FakeTensor)) and not rounds_as_eager


def why_not(rest: tuple[Any, ...], others: dict[str, Any], x: Any, other: Tensor | None = None) -> str:
    """Why ours do not take a norm of x; `other` is a tensor of the same shape, as a residual or a gate."""
    if (rest or others) and any(value is not None for value in (*rest, *others.values())):
        return f"arguments that norm_plugin does not know: {', '.join(others) or len(rest)}"
    if not isinstance(x, Tensor):
        return f"x is a {type(x).__name__}"
    if x.dtype not in DTYPES:
        return f"x has dtype {x.dtype}"
    if other is not None and other.shape != x.shape:
        return "what goes with x has another shape"
    return ""


# --- RMSNorm ------------------------------------------------------------------------------------------------------


def chosen_provider(name: str, *args: Any) -> str:
    """The provider that vLLM would choose for this call of an IR op without us; "" in a vLLM without IR."""
    try:
        from vllm import ir
    except ImportError:
        return ""
    op = getattr(ir.ops, name)
    for provider in op.get_priority():
        if not provider.startswith("norm_plugin") and op.impls[provider].supports_args(*args):
            return str(provider)
    return "native"


def rounds_before_weight(x: Tensor, weight: Tensor | None) -> bool:
    """Whether vLLM's native path rounds there: it multiplies in the weight's dtype."""
    return weight is not None and weight.dtype == x.dtype and x.dtype != torch.float32


def native_numerics(x: Tensor, weight: Tensor | None) -> str:
    """The numerics of vLLM's native RMSNorm."""
    return HF.name if rounds_before_weight(x, weight) else FP32.name


def rms_numerics(x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, size: int | None) -> str:
    """The numerics of what vLLM would run: its native path, or a kernel, which rounds once."""
    if residual is None:
        provider = chosen_provider("rms_norm", x, weight, eps, size)
    else:
        provider = chosen_provider("fused_add_rms_norm", x, residual, weight, eps, size)
    if provider == "native" or (provider == "" and x.device.type == "cpu"):
        return native_numerics(x, weight)
    return FP32.name if residual is None else VLLM_C.name


#: The answers of rms_numerics, by all that they depend on while one model is loaded.
_numerics: dict[tuple[Any, ...], str] = {}


def forget_choices() -> None:
    """Forget the numerics that were chosen: another model may have another configuration."""
    _numerics.clear()


def known_numerics(x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, size: int | None) -> str:
    """rms_numerics, asked once for each kind of call."""
    kind = (x.dtype, x.device.type, None if weight is None else weight.dtype, size, residual is None)
    found = _numerics.get(kind)
    if found is None:
        found = _numerics[kind] = rms_numerics(x, residual, weight, eps, size)
    return found


def arguments_of_rms_norm(
    layer: Any, x: Tensor, residual: Tensor | None
) -> tuple[Tensor | None, float, str, int | None] | str:
    """The weight, eps, numerics and size of a RMSNorm's call; or why ours do not take it."""
    given = layer.pass_weight if residual is None else layer.pass_weight_add
    weight: Tensor | None = layer.weight if given else None
    if weight is not None and weight.dtype != x.dtype and weight.dtype != torch.float32:
        return f"x has dtype {x.dtype} and the weight {weight.dtype}"
    eps, size = layer.variance_epsilon, layer.variance_size_override
    return weight, eps, known_numerics(x, residual, weight, eps, size), size


def rms_norm(layer: Any, x: Any, residual: Tensor | None = None, *rest: Any, **others: Any) -> Answer:
    """RMSNorm. With a residual, x and the residual may be overwritten, as vLLM's own kernels do."""
    op = "rmsnorm" if residual is None else "fused_add_rmsnorm"
    reason = why_not(rest, others, x, residual)
    if reason:
        return LeftToEngine(op, reason)
    arguments = arguments_of_rms_norm(layer, x, residual)
    if isinstance(arguments, str):
        return LeftToEngine(op, arguments)
    weight, eps, numerics, size = arguments
    if residual is None:
        normed = calls.rmsnorm(x, weight, eps, numerics, size=size)
        count(op, x, weight)
        return normed
    if residual.dtype != x.dtype:
        return LeftToEngine(op, f"x has dtype {x.dtype} and the residual {residual.dtype}")
    apart = not traced() and x.is_contiguous() and residual.is_contiguous() and x.data_ptr() != residual.data_ptr()
    if size is not None or not apart:
        both = calls.add_rmsnorm(x, residual, weight, eps, numerics, size=size)
        count("add_rmsnorm", x, weight)
        return both
    calls.fused_add_rmsnorm(x, residual, weight, eps, numerics)
    count(op, x, weight)
    return x, residual


def gemma_rms_norm(layer: Any, x: Any, residual: Tensor | None = None, *rest: Any, **others: Any) -> Answer:
    """GemmaRMSNorm: 1 + weight, in fp32. Its residual must not be overwritten."""
    op = "rmsnorm" if residual is None else "add_rmsnorm"
    reason = why_not(rest, others, x, residual)
    if reason:
        return LeftToEngine(op, reason)
    if residual is not None and residual.dtype != x.dtype:
        return LeftToEngine(op, f"x has dtype {x.dtype} and the residual {residual.dtype}")
    weight, eps = layer.weight, layer.variance_epsilon
    answer: Answer
    if residual is None:
        answer = calls.rmsnorm(x, weight, eps, gemma=True)
    else:
        answer = calls.add_rmsnorm(x, residual, weight, eps, gemma=True)
    count(op, x, weight)
    return answer


# --- LayerNorm ----------------------------------------------------------------------------------------------------


def layer_norm(layer: Any, x: Any, *rest: Any, **others: Any) -> Answer:
    """LayerNorm, which in vLLM is PyTorch's."""
    if reason := why_not(rest, others, x):
        return LeftToEngine("layernorm", reason)
    normed = calls.layernorm(x, layer.weight, layer.bias, layer.eps, calls.numerics_in_place_of(TORCH, x))
    count("layernorm", x, layer.weight)
    return normed


# --- gated --------------------------------------------------------------------------------------------------------


def rms_norm_gated(layer: Any, x: Any, z: Tensor | None = None, *rest: Any, **others: Any) -> Answer:
    """RMSNormGated."""
    if reason := why_not(rest, others, x, z):
        return LeftToEngine("gated_norm", reason)
    how = (layer.eps, layer.group_size, layer.norm_before_gate, True, layer.activation)
    normed = calls.gated_norm(x, layer.weight, None, z, *how, calls.numerics_in_place_of(TORCH, x))
    count("gated_norm", x, layer.weight)
    return normed


def fla_layer_norm(
    x: Any,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
    activation: str = "swish",
    *rest: Any,
    **others: Any,
) -> Answer:
    """The function layernorm_fn of FLA, which copies what is not contiguous before its kernel runs."""
    if reason := why_not(rest, others, x, z):
        return LeftToEngine("gated_norm", reason)
    normed = calls.gated_norm(x, weight, bias, z, eps, group_size, norm_before_gate, is_rms_norm, activation)
    count("gated_norm", x, weight)
    return normed


def fla_rms_norm(
    x: Any,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    *rest: Any,
    **others: Any,
) -> Answer:
    """The function rmsnorm_fn of FLA: the arguments of layernorm_fn without `is_rms_norm`."""
    return fla_layer_norm(x, weight, bias, z, eps, group_size, norm_before_gate, True, *rest, **others)


def fused_rms_norm_gated(
    layer: Any,
    x: Any,
    g: Tensor,
    residual: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    *rest: Any,
    **others: Any,
) -> Answer:
    """FusedRMSNormGated of the Kimi models: norm, then gate."""
    reason = why_not(rest, others, x, g)
    if reason or residual is not None or prenorm:
        return LeftToEngine("gated_norm", reason or "with a residual or prenorm")
    how = (layer.eps, None, True, True, layer.activation)
    normed = calls.gated_norm(x, layer.weight, layer.bias, g, *how, calls.numerics_in_place_of(TORCH, x))
    count("gated_norm", x, layer.weight)
    return normed


def mixer2_rms_norm_gated(layer: Any, x: Any, gate: Tensor, *rest: Any, **others: Any) -> Answer:
    """Mixer2RMSNormGated: gate, then norm by groups. A rank has some of the groups, or a part of the only one."""
    op = "gated_norm"
    if reason := why_not(rest, others, x, gate):
        return LeftToEngine(op, reason)
    if not layer.use_rms_norm:
        return LeftToEngine(op, "use_rms_norm=False: a gate without a norm")
    if layer.n_groups == 1 and layer.tp_size > 1:
        return one_group_across_ranks(layer, x, gate)
    if layer.n_groups % layer.tp_size != 0:
        # vLLM refuses models that would have such a layer
        return LeftToEngine(op, f"{layer.n_groups} groups over {layer.tp_size} ranks: some group has parts on several")
    one_kernel = layer.n_groups == 1 and x.device.type != "cpu"  # vLLM's own, which rounds once
    rounded_once = one_kernel or fused_by_inductor(x)
    numerics = FP32.name if rounded_once else calls.numerics_in_place_of(TORCH_HF, x)
    how = (layer.variance_epsilon, layer.group_size, False, True, "silu", numerics)
    normed = calls.gated_norm(x, layer.weight, None, gate, *how)
    count(op, x, layer.weight)
    return normed


def one_group_across_ranks(layer: Any, x: Tensor, gate: Tensor) -> Tensor:
    """vLLM adds up the sums of squares of all ranks, between two ops of ours. Neither op may decline: that rank would
    wait for other sums than the rest."""
    from vllm.distributed import tensor_model_parallel_all_reduce

    for op in split.OPS:
        count(op.name, x, layer.weight)
    how = (layer.variance_epsilon, layer.tp_size, tensor_model_parallel_all_reduce)
    numerics = FP32.name if fused_by_inductor(x) else calls.numerics_in_place_of(TORCH_HF, x)
    return split.rmsnorm_of_part(x, layer.weight, gate, *how, numerics=numerics)
