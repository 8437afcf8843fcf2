"""A forward and its backward, through each library's own autograd: what a layer costs in training. (Gemma's and the
gate before the norm are not timed: benchmarks/backward_error.py asks how far off they are.)

A call returns everything that it computes, the output and all gradients, so that all of it is compared. Liger would
write the gradient of x over that of the output, which another buffer then has to hold; it is asked not to.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import norm_plugin
from norm_plugin.bench.grid import BACKWARD_OPS
from norm_plugin.bench.our_calls import EPS, FORMULAS, Buffers, Make
from norm_plugin.bench.timing import Call

Function = Callable[..., Any]


def tensors(op: str, s: Buffers) -> tuple[Tensor, ...]:
    """What an op is called with and differentiated by."""
    return {
        "rms_backward": lambda: (s.x, s.w),
        "gemma_backward": lambda: (s.x, s.w),
        "add_backward": lambda: (s.x, s.r, s.w),
        "layer_backward": lambda: (s.x, s.w, s.b),
        "gated_backward": lambda: (s.x, s.w, s.z),
        "gate_first_backward": lambda: (s.x, s.w, s.z),
    }[op]()


def trained(op: str, f: Function) -> Make:
    """f(*tensors) and the gradients of all of them; the buffers of a set share the gradients that come in."""

    def make(s: Buffers) -> Call:
        leaves = [t.detach().requires_grad_() for t in tensors(op, s)]
        grads = [s.dy, s.dr] if op == "add_backward" else [s.dy]

        def call() -> tuple[Tensor, ...]:
            with torch.enable_grad():
                found = f(*leaves)
                outputs = list(found) if isinstance(found, (tuple, list)) else [found]
                return (*[o.detach() for o in outputs], *torch.autograd.grad(outputs, leaves, grads))

        return call

    return make


def each(functions: dict[str, Function]) -> dict[str, Make]:
    return {op: trained(op, f) for op, f in functions.items()}


OURS = each(
    {
        "rms_backward": lambda x, w: norm_plugin.rmsnorm(x, w, EPS),
        "add_backward": lambda x, r, w: norm_plugin.add_rmsnorm(x, r, w, EPS),
        "layer_backward": lambda x, w, b: norm_plugin.layernorm(x, w, b, EPS),
        "gated_backward": lambda x, w, z: norm_plugin.rmsnorm_fn(x, w, None, z, EPS),
        "gemma_backward": lambda x, w: norm_plugin.gemma_rmsnorm(x, w, EPS),
        "gate_first_backward": lambda x, w, z: norm_plugin.rmsnorm_fn(x, w, None, z, EPS, None, False),
    }
)


def liger() -> dict[str, Make]:
    f = importlib.import_module("liger_kernel.transformers.functional")
    return each(
        {
            "rms_backward": lambda x, w: f.liger_rms_norm(x, w, EPS, 0.0, "llama", False),
            "gemma_backward": lambda x, w: f.liger_rms_norm(x, w, EPS, 1.0, "gemma", False),
            "add_backward": lambda x, r, w: f.liger_fused_add_rms_norm(x, r, w, EPS, 0.0, "llama", False),
            "layer_backward": lambda x, w, b: f.liger_layer_norm(x, w, b, EPS),
        }
    )


def quack() -> dict[str, Make]:  # its LayerNorm has no backward
    norm = importlib.import_module("quack.rmsnorm").rmsnorm
    return each(
        {
            "rms_backward": lambda x, w: norm(x, w, eps=EPS),
            "gemma_backward": lambda x, w: norm(x, w, eps=EPS, weight_offset=1.0),
            "add_backward": lambda x, r, w: norm(x, w, residual=r, eps=EPS, prenorm=True),
        }
    )


def fla() -> dict[str, Make]:
    norm = importlib.import_module("fla.modules.norm.layernorm")
    gated = importlib.import_module("fla.modules.norm.fused_norm_gate")
    groups = importlib.import_module("fla.modules.norm.layernorm_gated")
    return each(
        {
            "rms_backward": lambda x, w: norm.rms_norm(x, w, None, eps=EPS),
            "add_backward": lambda x, r, w: norm.rms_norm(x, w, None, residual=r, eps=EPS, prenorm=True),
            "layer_backward": lambda x, w, b: norm.layer_norm(x, w, b, eps=EPS),
            "gated_backward": lambda x, w, z: gated.rms_norm_gated(x, z, w, None, eps=EPS),
            "gate_first_backward": lambda x, w, z: groups.rmsnorm_fn(x, w, None, z, EPS, None, False),
        }
    )


def functional() -> dict[str, Make]:
    return each(
        {
            "rms_backward": lambda x, w: F.rms_norm(x, x.shape[-1:], w, EPS),
            "layer_backward": lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b, EPS),
        }
    )


def inductor() -> dict[str, Make]:
    """The formulas that torch.compile gets for the forward alone, differentiated by it."""
    config: Any = importlib.import_module("torch._dynamo.config")
    config.recompile_limit = config.accumulated_recompile_limit = 4096
    return each({op: torch.compile(FORMULAS[op.removesuffix("_backward")][0], dynamic=False) for op in BACKWARD_OPS})


def parts(result: Sequence[Tensor]) -> list[Tensor]:
    """The outputs and gradients in fp32, for the check."""
    return [t.float() for t in result]
