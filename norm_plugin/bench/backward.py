"""A forward and its backward, through each library's own autograd: what a layer costs in training.

Gemma's norm and the gate before the norm are not timed; benchmarks/backward_error.py measures their errors. Liger is
told not to write the gradient of x over that of the output, which other calls use again.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from norm_plugin.bench.buffers import EPS, Buffers, Function


def trained(f: Function, s: Buffers) -> Callable[[], tuple[Tensor, ...]]:
    """A call of f that returns its outputs and the gradients of all that it takes."""
    leaves = [t.detach().requires_grad_() for t in s.taken(f).values()]
    grads = [s.dy, s.dr] if s.point.op == "add_backward" else [s.dy]

    def call() -> tuple[Tensor, ...]:
        with torch.enable_grad():
            found = f(*leaves)
            outputs = list(found) if isinstance(found, (tuple, list)) else [found]
            return (*[o.detach() for o in outputs], *torch.autograd.grad(outputs, leaves, grads))

    return call


def liger() -> dict[str, Function]:
    f = importlib.import_module("liger_kernel.transformers.functional")
    return {
        "rms_backward": lambda x, w: f.liger_rms_norm(x, w, EPS, 0.0, "llama", False),
        "gemma_backward": lambda x, w: f.liger_rms_norm(x, w, EPS, 1.0, "gemma", False),
        "add_backward": lambda x, r, w: f.liger_fused_add_rms_norm(x, r, w, EPS, 0.0, "llama", False),
        "layer_backward": lambda x, w, b: f.liger_layer_norm(x, w, b, EPS),
    }


def quack() -> dict[str, Function]:  # its LayerNorm has no backward
    norm = importlib.import_module("quack.rmsnorm").rmsnorm
    return {
        "rms_backward": lambda x, w: norm(x, w, eps=EPS),
        "gemma_backward": lambda x, w: norm(x, w, eps=EPS, weight_offset=1.0),
        "add_backward": lambda x, r, w: norm(x, w, residual=r, eps=EPS, prenorm=True),
    }


def fla() -> dict[str, Function]:
    norm = importlib.import_module("fla.modules.norm.layernorm")
    gated = importlib.import_module("fla.modules.norm.fused_norm_gate")
    groups = importlib.import_module("fla.modules.norm.layernorm_gated")
    return {
        "rms_backward": lambda x, w: norm.rms_norm(x, w, None, eps=EPS),
        "add_backward": lambda x, r, w: norm.rms_norm(x, w, None, residual=r, eps=EPS, prenorm=True),
        "layer_backward": lambda x, w, b: norm.layer_norm(x, w, b, eps=EPS),
        "gated_backward": lambda x, w, z: gated.rms_norm_gated(x, z, w, None, eps=EPS),
        "gate_first_backward": lambda x, w, z: groups.rmsnorm_fn(x, w, None, z, EPS, None, False),
    }
