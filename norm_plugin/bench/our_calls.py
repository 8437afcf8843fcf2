"""For each op our call, on the buffers that its parameters are named after."""

from __future__ import annotations

import norm_plugin
from norm_plugin.bench.buffers import EPS, Function

OURS: dict[str, Function] = {
    "rms": lambda x, w, out: norm_plugin.rmsnorm(x, w, EPS, out),
    "add": lambda x_copy, r_copy, w: norm_plugin.fused_add_rmsnorm(x_copy, r_copy, w, EPS),
    "gemma": lambda x, w, out: norm_plugin.gemma_rmsnorm(x, w, EPS, out),
    "gemma_add": lambda x_copy, r_copy, w: norm_plugin.gemma_fused_add_rmsnorm(x_copy, r_copy, w, EPS),
    "layer": lambda x, w, b: norm_plugin.layernorm(x, w, b, EPS),
    "gated": lambda x, w, z: norm_plugin.rmsnorm_fn(x, w, None, z, EPS),
    "gate_first": lambda x, w, z: norm_plugin.rmsnorm_fn(x, w, None, z, EPS, None, False),
    "groups": lambda x, w, z, group: norm_plugin.rmsnorm_fn(x, w, None, z, EPS, group, False),
    "qk": lambda x, w, out: norm_plugin.rmsnorm(x, w, EPS, out),
    "l2": lambda x: norm_plugin.l2norm(x, EPS),
    "static_quant": lambda out8, x, w, scale: norm_plugin.rmsnorm_quant(out8, x, w, scale, EPS),
    "static_quant_add": lambda out8, x, r_copy, w, scale: norm_plugin.fused_add_rmsnorm_quant(
        out8, x, r_copy, w, scale, EPS
    ),
    "token_quant": lambda x, w: norm_plugin.rmsnorm_dynamic_quant(x, w, None, EPS),
    "block_quant": lambda x, w, block: norm_plugin.rmsnorm_block_quant(x, w, None, EPS, block),
    "rms_backward": lambda x, w: norm_plugin.rmsnorm(x, w, EPS),
    "add_backward": lambda x, r, w: norm_plugin.add_rmsnorm(x, r, w, EPS),
    "layer_backward": lambda x, w, b: norm_plugin.layernorm(x, w, b, EPS),
    "gated_backward": lambda x, w, z: norm_plugin.rmsnorm_fn(x, w, None, z, EPS),
    "gemma_backward": lambda x, w: norm_plugin.gemma_rmsnorm(x, w, EPS),
    "gate_first_backward": lambda x, w, z: norm_plugin.rmsnorm_fn(x, w, None, z, EPS, None, False),
}

#: The same norm with an output that is not quantised: what a fused quantisation is held against.
ALONE = {
    "static_quant": OURS["rms"],
    "static_quant_add": OURS["add"],
    "token_quant": OURS["rms"],
    "block_quant": OURS["rms"],
}
