"""How each library is called for each op: its lowest public door, in bf16, with PDL where it has that.

An in-place op gets its own copies. A call returns its output (and, where it is quantised, the scales) for the check.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from norm_plugin.bench import backward
from norm_plugin.bench.grid import BACKWARD_OPS
from norm_plugin.bench.our_calls import (
    BLOCK,
    EPS,
    FORMULAS,
    Buffers,
    Make,
    in_place_add,
    into_out,
    static_quant,
    static_quant_add,
)
from norm_plugin.bench.timing import Call

Makes = dict[str, Make]


@dataclass(frozen=True)
class Library:
    """`load` imports it. `kernels_on_disk`: what it compiles is found again by another process."""

    name: str
    ops: tuple[str, ...]
    load: Callable[[], Makes]
    kernels_on_disk: bool = False


def _plain(f: Callable[..., Any], *rest: Any) -> Make:
    """f(out, x, w, eps, *rest), which writes out."""

    def make(s: Buffers) -> Call:
        x, w, out = s.x, s.w, s.out
        return lambda: f(out, x, w, EPS, *rest) or out

    return make


def flashinfer() -> Makes:
    norm = importlib.import_module("flashinfer.norm")

    def layer(s: Buffers) -> Call:  # it takes fp32 parameters, and has no PDL
        x, w, b = s.x, s.w32, s.b32
        return lambda: norm.layernorm(x, w, b, EPS)

    return {
        "rms": into_out(norm.rmsnorm, True),
        "qk": into_out(norm.rmsnorm, True),
        "gemma": into_out(norm.gemma_rmsnorm, True),
        "layer": layer,
        "add": in_place_add(norm.fused_add_rmsnorm, True),
        "gemma_add": in_place_add(norm.gemma_fused_add_rmsnorm, True),
        "static_quant": static_quant(norm.rmsnorm_quant, True),
        "static_quant_add": static_quant_add(norm.fused_add_rmsnorm_quant, True),
    }


def sgl_kernel() -> Makes:
    importlib.import_module("sgl_kernel")  # its Python functions call FlashInfer: the ops are its own kernels
    ops = torch.ops.sgl_kernel
    return {
        "rms": _plain(ops.rmsnorm.default, True),
        "gemma": _plain(ops.gemma_rmsnorm.default, True),
        "add": in_place_add(ops.fused_add_rmsnorm.default, True),
        "gemma_add": in_place_add(ops.gemma_fused_add_rmsnorm.default, True),
    }


def vllm_c() -> Makes:
    try:
        importlib.import_module("vllm._C_stable_libtorch")
    except ModuleNotFoundError:  # what it was called before 0.26
        importlib.import_module("vllm._C")
    ops = torch.ops._C

    def token(s: Buffers) -> Call:
        x, w, out, scales = s.x, s.w, s.out8, s.scales(1)
        f = ops.rms_norm_dynamic_per_token_quant.default
        return lambda: f(out, x, w, scales, EPS, None, None) or (out, scales)

    def block(s: Buffers) -> Call:
        x, w, out, scales = s.x, s.w, s.out8, s.scales(s.point.width // BLOCK)
        f = ops.rms_norm_per_block_quant.default
        return lambda: f(out, x, w, scales, EPS, None, None, BLOCK, False) or (out, scales)

    return {
        "rms": _plain(ops.rms_norm.default),
        "qk": _plain(ops.rms_norm.default),
        "add": in_place_add(ops.fused_add_rms_norm.default),
        "static_quant": static_quant(ops.rms_norm_static_fp8_quant.default),
        "static_quant_add": static_quant_add(ops.fused_add_rms_norm_static_fp8_quant.default),
        "token_quant": token,
        "block_quant": block,
    }


def quack() -> Makes:
    norm = importlib.import_module("quack.rmsnorm")

    def rms(s: Buffers) -> Call:
        x, w = s.x, s.w
        return lambda: norm.rmsnorm_fwd(x, w, eps=EPS)[0]

    def add(s: Buffers) -> Call:
        x, r, w = s.x, s.r, s.w
        return lambda: norm.rmsnorm_fwd(x, w, residual=r, eps=EPS)[:2]

    def layer(s: Buffers) -> Call:  # it wants fp32 parameters
        x, w, b = s.x, s.w32, s.b32
        return lambda: norm.layernorm_fwd(x, w, b, EPS)

    def heads(s: Buffers) -> Call:
        x, w = s.x, s.head_weights
        return lambda: norm.rmsnorm_fwd(x, w, eps=EPS)[0]

    return {"rms": rms, "add": add, "layer": layer, "qk": heads}


def liger() -> Makes:
    rms_forward = importlib.import_module("liger_kernel.ops.rms_norm").rms_norm_forward
    add_forward = importlib.import_module("liger_kernel.ops.fused_add_rms_norm").fused_add_rms_norm_forward
    layer_forward = importlib.import_module("liger_kernel.ops.layer_norm").layer_norm_forward

    def rms(s: Buffers) -> Call:
        x, w = s.x, s.w
        return lambda: rms_forward(x, w, EPS, 0.0, "llama", None)[0]

    def gemma(s: Buffers) -> Call:
        x, w = s.x, s.w
        return lambda: rms_forward(x, w, EPS, 1.0, "gemma", None)[0]

    def add(s: Buffers) -> Call:
        x, r, w = s.x, s.r, s.w
        return lambda: add_forward(x, r, w, EPS, 0.0, "llama")[:2]

    def gemma_add(s: Buffers) -> Call:
        x, r, w = s.x, s.r, s.w
        return lambda: add_forward(x, r, w, EPS, 1.0, "gemma")[:2]

    def layer(s: Buffers) -> Call:
        x, w, b = s.x, s.w, s.b
        return lambda: layer_forward(x, w, b, EPS)[0]

    return {"rms": rms, "gemma": gemma, "add": add, "gemma_add": gemma_add, "layer": layer}


def fla() -> Makes:
    forward = importlib.import_module("fla.modules.norm.layernorm").layer_norm_fwd
    gate_forward = importlib.import_module("fla.modules.norm.fused_norm_gate").layer_norm_gated_fwd
    l2_forward = importlib.import_module("fla.modules.norm.l2norm").l2norm_fwd

    def rms(s: Buffers) -> Call:
        x, w = s.x, s.w
        return lambda: forward(x, w, None, EPS, is_rms_norm=True)[0]

    def add(s: Buffers) -> Call:
        x, r, w = s.x, s.r, s.w
        return lambda: forward(x, w, None, EPS, residual=r, is_rms_norm=True)[::3]

    def layer(s: Buffers) -> Call:
        x, w, b = s.x, s.w, s.b
        return lambda: forward(x, w, b, EPS)[0]

    def gated(s: Buffers) -> Call:
        x, z, w = s.x, s.z, s.w
        return lambda: gate_forward(x, z, w, None, "swish", EPS, is_rms_norm=True)[0]

    def l2(s: Buffers) -> Call:
        x = s.x
        return lambda: l2_forward(x, EPS)[0]

    return {"rms": rms, "add": add, "layer": layer, "gated": gated, "l2": l2}


def _mamba_style(f: Callable[..., Any]) -> Makes:
    """f(x, weight, bias, eps, z=, group_size=, norm_before_gate=, is_rms_norm=) -> (out, mean, rstd)."""

    def gated(s: Buffers) -> Call:
        x, z, w, group, before = s.x, s.z, s.w, s.point.group, s.point.op == "gated"
        return lambda: f(x, w, None, EPS, z=z, group_size=group, norm_before_gate=before, is_rms_norm=True)[0]

    def layer(s: Buffers) -> Call:
        x, w, b = s.x, s.w, s.b
        return lambda: f(x, w, b, EPS)[0]

    return {"gated": gated, "gate_first": gated, "groups": gated, "layer": layer}


def fla_groups() -> Makes:
    return _mamba_style(importlib.import_module("fla.modules.norm.layernorm_gated").layer_norm_fwd)


def vllm_fla() -> Makes:
    name = "vllm.third_party.flash_linear_attention.ops.layernorm_guard"
    return _mamba_style(importlib.import_module(name).layer_norm_fwd)


def vllm_mamba() -> Makes:  # the kernel of mamba_ssm
    name = "vllm.model_executor.layers.mamba.ops.layernorm_gated"
    return _mamba_style(importlib.import_module(name)._layer_norm_fwd)


def sglang_fla() -> Makes:
    name = "sglang.kernels.ops.attention.fla.layernorm_gated"
    return _mamba_style(importlib.import_module(name)._layer_norm_fwd)


def sglang_norm_gate() -> Makes:
    forward = importlib.import_module("sglang.kernels.ops.attention.fla.fused_norm_gate").layer_norm_gated_fwd

    def gated(s: Buffers) -> Call:
        x, z, w = s.x, s.z, s.w
        return lambda: forward(x, z, w, None, "swish", EPS, out_dtype=x.dtype, is_rms_norm=True)[0]

    return {"gated": gated}


def functional() -> Makes:
    def rms(s: Buffers) -> Call:
        x, w, shape = s.x, s.w, (s.point.width,)
        return lambda: F.rms_norm(x, shape, w, EPS)

    def layer(s: Buffers) -> Call:
        x, w, b, shape = s.x, s.w, s.b, (s.point.width,)
        return lambda: F.layer_norm(x, shape, w, b, EPS)

    return {"rms": rms, "qk": rms, "layer": layer}


def inductor() -> Makes:
    config: Any = importlib.import_module("torch._dynamo.config")
    config.recompile_limit = config.accumulated_recompile_limit = 4096  # beyond the limit it goes eager, silently

    def make_for(op: str) -> Make:
        formula, arguments = FORMULAS[op]
        run = torch.compile(formula, dynamic=False)

        def make(s: Buffers) -> Call:
            given = arguments(s)
            return lambda: run(*given)

        return make

    return {op: make_for(op) for op in FORMULAS}


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
    Library("FLA layernorm_gated", GATED, fla_groups, True),
    Library("vLLM layernorm_guard", (*GATED, "layer"), vllm_fla, True),
    Library("mamba_ssm (vLLM's copy)", GATED, vllm_mamba, True),
    Library("SGLang layernorm_gated", GATED, sglang_fla, True),
    Library("SGLang fused_norm_gate", ("gated",), sglang_norm_gate, True),
    Library("torch.nn.functional", ("rms", "layer", "qk"), functional),
    Library(COMPILED, tuple(FORMULAS), inductor, True),
    Library("Quack", ("rms_backward", "add_backward"), backward.quack, True),
    Library("Liger", ("rms_backward", "add_backward", "layer_backward"), backward.liger, True),
    Library("FLA", BACKWARD_OPS, backward.fla, True),
    Library("torch.nn.functional", ("rms_backward", "layer_backward"), backward.functional),
    Library(COMPILED, BACKWARD_OPS, backward.inductor, True),
)
