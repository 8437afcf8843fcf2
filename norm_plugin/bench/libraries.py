"""How each library is called for each op: its lowest public door, in bf16, with PDL where it has that.

Parameters are named after the buffers that they get. What a call returns or else writes, an output and where it is
quantised the scales, is checked.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from norm_plugin.bench import backward
from norm_plugin.bench.buffers import EPS, Function
from norm_plugin.bench.formulas import FORMULAS
from norm_plugin.bench.grid import BACKWARD_OPS

Functions = dict[str, Function]


@dataclass(frozen=True)
class Library:
    """`load` imports it. `kernels_on_disk`: what it compiles is found again by another process."""

    name: str
    ops: tuple[str, ...]
    load: Callable[[], Functions]
    kernels_on_disk: bool = False


def flashinfer() -> Functions:
    norm = importlib.import_module("flashinfer.norm")
    return {
        "rms": lambda x, w, out: norm.rmsnorm(x, w, EPS, out, True),
        "qk": lambda x, w, out: norm.rmsnorm(x, w, EPS, out, True),
        "gemma": lambda x, w, out: norm.gemma_rmsnorm(x, w, EPS, out, True),
        "layer": lambda x, w32, b32: norm.layernorm(x, w32, b32, EPS),  # it takes fp32 parameters, and has no PDL
        "add": lambda x_copy, r_copy, w: norm.fused_add_rmsnorm(x_copy, r_copy, w, EPS, True),
        "gemma_add": lambda x_copy, r_copy, w: norm.gemma_fused_add_rmsnorm(x_copy, r_copy, w, EPS, True),
        "static_quant": lambda out8, x, w, scale: norm.rmsnorm_quant(out8, x, w, scale, EPS, True),
        "static_quant_add": lambda out8, x, r_copy, w, scale: norm.fused_add_rmsnorm_quant(
            out8, x, r_copy, w, scale, EPS, True
        ),
    }


def sgl_kernel() -> Functions:
    importlib.import_module("sgl_kernel")  # its Python functions call FlashInfer: the ops are its own kernels
    ops = torch.ops.sgl_kernel
    add, gemma_add = ops.fused_add_rmsnorm.default, ops.gemma_fused_add_rmsnorm.default
    return {
        "rms": lambda out, x, w: ops.rmsnorm.default(out, x, w, EPS, True),
        "gemma": lambda out, x, w: ops.gemma_rmsnorm.default(out, x, w, EPS, True),
        "add": lambda x_copy, r_copy, w: add(x_copy, r_copy, w, EPS, True),
        "gemma_add": lambda x_copy, r_copy, w: gemma_add(x_copy, r_copy, w, EPS, True),
    }


def vllm_c() -> Functions:
    try:
        importlib.import_module("vllm._C_stable_libtorch")
    except ModuleNotFoundError:  # what it was called before 0.26
        importlib.import_module("vllm._C")
    ops = torch.ops._C
    add, static = ops.fused_add_rms_norm.default, ops.rms_norm_static_fp8_quant.default
    static_add = ops.fused_add_rms_norm_static_fp8_quant.default
    token, by_block = ops.rms_norm_dynamic_per_token_quant.default, ops.rms_norm_per_block_quant.default
    return {
        "rms": lambda out, x, w: ops.rms_norm.default(out, x, w, EPS),
        "qk": lambda out, x, w: ops.rms_norm.default(out, x, w, EPS),
        "add": lambda x_copy, r_copy, w: add(x_copy, r_copy, w, EPS),
        "static_quant": lambda out8, x, w, scale: static(out8, x, w, scale, EPS),
        "static_quant_add": lambda out8, x, r_copy, w, scale: static_add(out8, x, r_copy, w, scale, EPS),
        "token_quant": lambda x, w, out8, token_scales: token(out8, x, w, token_scales, EPS, None, None),
        "block_quant": lambda x, w, out8, block_scales, block: by_block(
            out8, x, w, block_scales, EPS, None, None, block, False
        ),
    }


def quack() -> Functions:
    norm = importlib.import_module("quack.rmsnorm")
    return {
        "rms": lambda x, w: norm.rmsnorm_fwd(x, w, eps=EPS)[0],
        "add": lambda x, r, w: norm.rmsnorm_fwd(x, w, residual=r, eps=EPS)[:2],
        "layer": lambda x, w32, b32: norm.layernorm_fwd(x, w32, b32, EPS),  # it wants fp32 parameters
        "qk": lambda x, head_weights: norm.rmsnorm_fwd(x, head_weights, eps=EPS)[0],
    }


def liger() -> Functions:
    rms = importlib.import_module("liger_kernel.ops.rms_norm").rms_norm_forward
    add = importlib.import_module("liger_kernel.ops.fused_add_rms_norm").fused_add_rms_norm_forward
    layer = importlib.import_module("liger_kernel.ops.layer_norm").layer_norm_forward
    return {
        "rms": lambda x, w: rms(x, w, EPS, 0.0, "llama", None)[0],
        "gemma": lambda x, w: rms(x, w, EPS, 1.0, "gemma", None)[0],
        "add": lambda x, r, w: add(x, r, w, EPS, 0.0, "llama")[:2],
        "gemma_add": lambda x, r, w: add(x, r, w, EPS, 1.0, "gemma")[:2],
        "layer": lambda x, w, b: layer(x, w, b, EPS)[0],
    }


def fla() -> Functions:
    norm = importlib.import_module("fla.modules.norm.layernorm").layer_norm_fwd
    gated = importlib.import_module("fla.modules.norm.fused_norm_gate").layer_norm_gated_fwd
    l2 = importlib.import_module("fla.modules.norm.l2norm").l2norm_fwd
    return {
        "rms": lambda x, w: norm(x, w, None, EPS, is_rms_norm=True)[0],
        "add": lambda x, r, w: norm(x, w, None, EPS, residual=r, is_rms_norm=True)[::3],
        "layer": lambda x, w, b: norm(x, w, b, EPS)[0],
        "gated": lambda x, z, w: gated(x, z, w, None, "swish", EPS, is_rms_norm=True)[0],
        "l2": lambda x: l2(x, EPS)[0],
    }


def mamba_style(module: str, name: str) -> Callable[[], Functions]:
    """Loads f(x, weight, bias, eps, z=, group_size=, norm_before_gate=, is_rms_norm=) -> (out, mean, rstd)."""

    def load() -> Functions:
        f = getattr(importlib.import_module(module), name)

        def gate_first(x: Any, w: Any, z: Any, group: int | None) -> Any:
            return f(x, w, None, EPS, z=z, group_size=group, norm_before_gate=False, is_rms_norm=True)[0]

        return {
            "gated": lambda x, w, z, group: f(
                x, w, None, EPS, z=z, group_size=group, norm_before_gate=True, is_rms_norm=True
            )[0],
            "gate_first": gate_first,
            "groups": gate_first,
            "layer": lambda x, w, b: f(x, w, b, EPS)[0],
        }

    return load


def sglang_norm_gate() -> Functions:
    f = importlib.import_module("sglang.kernels.ops.attention.fla.fused_norm_gate").layer_norm_gated_fwd
    return {"gated": lambda x, z, w: f(x, z, w, None, "swish", EPS, out_dtype=x.dtype, is_rms_norm=True)[0]}


def functional() -> Functions:
    def rms(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, w.shape, w, EPS)

    def layer(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, w.shape, w, b, EPS)

    return {"rms": rms, "qk": rms, "layer": layer, "rms_backward": rms, "layer_backward": layer}


def inductor() -> Functions:
    """The formulas, and those that are timed with a backward differentiated by it."""
    config: Any = importlib.import_module("torch._dynamo.config")
    config.recompile_limit = config.accumulated_recompile_limit = 4096  # beyond the limit it goes eager, silently
    ops = (*FORMULAS, *BACKWARD_OPS)
    return {op: torch.compile(FORMULAS[op.removesuffix("_backward")], dynamic=False) for op in ops}


GATED = ("gated", "gate_first", "groups")
COMPILED = "torch.compile"

LIBRARIES = (
    Library(
        "FlashInfer",
        ("rms", "add", "gemma", "gemma_add", "layer", "qk", "static_quant", "static_quant_add"),
        flashinfer,
    ),
    Library("sgl_kernel", ("rms", "add", "gemma", "gemma_add"), sgl_kernel),
    Library("vllm._C", ("rms", "add", "qk", "static_quant", "static_quant_add", "token_quant", "block_quant"), vllm_c),
    Library("Quack", ("rms", "add", "layer", "qk"), quack, True),
    Library("Liger", ("rms", "add", "gemma", "gemma_add", "layer"), liger, True),
    Library("FLA", ("rms", "add", "layer", "gated", "l2"), fla, True),
    Library("FLA layernorm_gated", GATED, mamba_style("fla.modules.norm.layernorm_gated", "layer_norm_fwd"), True),
    Library(
        "vLLM layernorm_guard",
        (*GATED, "layer"),
        mamba_style("vllm.third_party.flash_linear_attention.ops.layernorm_guard", "layer_norm_fwd"),
        True,
    ),
    Library(
        "mamba_ssm (vLLM's copy)",
        GATED,
        mamba_style("vllm.model_executor.layers.mamba.ops.layernorm_gated", "_layer_norm_fwd"),
        True,
    ),
    Library(
        "SGLang layernorm_gated",
        GATED,
        mamba_style("sglang.kernels.ops.attention.fla.layernorm_gated", "_layer_norm_fwd"),
        True,
    ),
    Library("SGLang fused_norm_gate", ("gated",), sglang_norm_gate, True),
    Library("torch.nn.functional", ("rms", "layer", "qk", "rms_backward", "layer_backward"), functional),
    Library(COMPILED, (*FORMULAS, *BACKWARD_OPS), inductor, True),
    Library("Quack", ("rms_backward", "add_backward"), backward.quack, True),
    Library("Liger", ("rms_backward", "add_backward", "layer_backward"), backward.liger, True),
    Library("FLA", BACKWARD_OPS, backward.fla, True),
)
