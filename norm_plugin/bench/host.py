"""What one eager call of a public function costs the host, and what it allocates."""

from __future__ import annotations

from functools import partial
from pkgutil import resolve_name
from typing import Any

import torch

import norm_plugin
from norm_plugin.bench.buffers import EPS, Buffers
from norm_plugin.bench.grid import Point
from norm_plugin.bench.libraries import vllm_c
from norm_plugin.bench.peers import OUR_NAME, LeftOut, attempt
from norm_plugin.bench.timing import Call, host_time

ROUNDS = 3
ROWS, WIDTH = 1, 4096


def contenders(s: Buffers) -> dict[str, dict[str, tuple[Any, ...]]]:
    """Call -> who -> the function and its arguments, as their users write it: no `out` unless the call is named so."""
    x, r, w, b, out, shape = s.x, s.r, s.w, s.b, s.out, (WIDTH,)
    return {
        "rmsnorm": {
            OUR_NAME: ("norm_plugin:rmsnorm", x, w, EPS),
            "FlashInfer": ("flashinfer.norm:rmsnorm", x, w, EPS),
            "sgl_kernel": ("sgl_kernel:rmsnorm", x, w, EPS),
            "torch.nn.functional": ("torch.nn.functional:rms_norm", x, shape, w, EPS),
        },
        "rmsnorm, out given": {
            OUR_NAME: ("norm_plugin:rmsnorm", x, w, EPS, out),
            "FlashInfer": ("flashinfer.norm:rmsnorm", x, w, EPS, out),
            "sgl_kernel": ("sgl_kernel:rmsnorm", x, w, EPS, out),
            "vllm._C": ("torch:ops._C.rms_norm", out, x, w, EPS),
        },
        "fused_add_rmsnorm": {
            OUR_NAME: ("norm_plugin:fused_add_rmsnorm", x, r, w, EPS),
            "FlashInfer": ("flashinfer.norm:fused_add_rmsnorm", x, r, w, EPS),
            "sgl_kernel": ("sgl_kernel:fused_add_rmsnorm", x, r, w, EPS),
            "vllm._C": ("torch:ops._C.fused_add_rms_norm", x, r, w, EPS),
        },
        "gemma_rmsnorm": {
            OUR_NAME: ("norm_plugin:gemma_rmsnorm", x, w, EPS),
            "FlashInfer": ("flashinfer.norm:gemma_rmsnorm", x, w, EPS),
            "sgl_kernel": ("sgl_kernel:gemma_rmsnorm", x, w, EPS),
        },
        "layernorm": {
            OUR_NAME: ("norm_plugin:layernorm", x, w, b, EPS),
            "FlashInfer": ("flashinfer.norm:layernorm", x, s.w32, s.b32, EPS),
            "torch.nn.functional": ("torch.nn.functional:layer_norm", x, shape, w, b, EPS),
        },
        "rmsnorm_fn": {OUR_NAME: ("norm_plugin:rmsnorm_fn", x, w, None, s.z, EPS)},
    }


def called(name: str, *args: Any) -> Call:
    """A call of the function of that name."""
    if name.startswith("torch:ops._C"):
        vllm_c()  # its import registers them
    f = resolve_name(name)
    return lambda: f(*args)


def host_costs() -> tuple[list[dict[str, Any]], list[LeftOut]]:
    """Microseconds of each call and contender, taken in turn for some rounds; the least of the medians."""
    found: list[dict[str, Any]] = []
    left: list[LeftOut] = []
    for name, written in contenders(Buffers(Point("host", "rms", ROWS, WIDTH))).items():
        calls: dict[str, Call] = {}
        for who, how in written.items():
            call, why = attempt(partial(called, *how))
            if not why:
                _, why = attempt(call)
            if why:
                left.append(LeftOut(who, f"host cost of {name}", why))
            else:
                calls[who] = call
        rounds: dict[str, list[Any]] = {who: [] for who in calls}
        for _ in range(ROUNDS):
            for who, call in calls.items():
                rounds[who].append(host_time(call))
        best = {who: min(times, key=lambda time: time.median) for who, times in rounds.items()}
        times = {who: {"median": time.median, "spread": time.spread} for who, time in best.items()}
        found.append({"call": name, "times": times})
    return found, left


def allocated(call: Call) -> int:
    """The bytes that one call asks of the allocator."""
    call()
    torch.cuda.synchronize()
    key = "requested_bytes.all.allocated"
    before = torch.cuda.memory_stats()[key]
    result = call()
    torch.cuda.synchronize()
    after = torch.cuda.memory_stats()[key]
    del result
    return int(after - before)


def memory() -> list[dict[str, Any]]:
    """What each of our calls allocates, beside the bytes of what it returns."""
    rows, width = 64, 4096
    s = Buffers(Point("host", "rms", rows, width))
    q = Buffers(Point("host", "qk", rows, 128, None, 32)).x
    x, r, w, b, z, out, out8, scale, w128 = s.x, s.r, s.w, s.b, s.z, s.out, s.out8, s.scale, s.normal(128)
    plain = rows * width * 2
    calls: dict[str, tuple[Call, int]] = {
        "rmsnorm": (lambda: norm_plugin.rmsnorm(x, w, EPS), plain),
        "rmsnorm, out given": (lambda: norm_plugin.rmsnorm(x, w, EPS, out), 0),
        "rmsnorm of a q slice": (lambda: norm_plugin.rmsnorm(q, w128, EPS), rows * 32 * 128 * 2),
        "fused_add_rmsnorm": (lambda: norm_plugin.fused_add_rmsnorm(x, r, w, EPS), 0),
        "add_rmsnorm": (lambda: norm_plugin.add_rmsnorm(x, r, w, EPS), 2 * plain),
        "gemma_rmsnorm": (lambda: norm_plugin.gemma_rmsnorm(x, w, EPS), plain),
        "layernorm": (lambda: norm_plugin.layernorm(x, w, b, EPS), plain),
        "rmsnorm_fn": (lambda: norm_plugin.rmsnorm_fn(x, w, None, z, EPS), plain),
        "rmsnorm_fn in groups": (lambda: norm_plugin.rmsnorm_fn(x, w, None, z, EPS, 512, False), plain),
        "l2norm": (lambda: norm_plugin.l2norm(x, EPS), plain),
        "rmsnorm_quant": (lambda: norm_plugin.rmsnorm_quant(out8, x, w, scale, EPS), 0),
        "fused_add_rmsnorm_quant": (lambda: norm_plugin.fused_add_rmsnorm_quant(out8, x, r, w, scale, EPS), 0),
        "rmsnorm_dynamic_quant": (lambda: norm_plugin.rmsnorm_dynamic_quant(x, w), plain // 2 + rows * 4),
        "rmsnorm_block_quant": (lambda: norm_plugin.rmsnorm_block_quant(x, w), plain // 2 + rows * width // 128 * 4),
    }
    found = []
    for name, (call, output) in calls.items():
        got, why = attempt(partial(allocated, call))
        found.append({"call": name, "allocated": got, "output": output, "error": why})
    return found
