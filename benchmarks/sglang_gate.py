"""SGLang's fused_norm_gate against ours at decode sizes, rows of 32 heads of 128, as in Qwen3-Next.

PYTHONPATH=<SGLang and what it needs>:. python -m benchmarks.sglang_gate [--json FILE]
"""

from __future__ import annotations

import statistics
from functools import partial

import torch

from benchmarks import records
from norm_plugin import rmsnorm_fn
from norm_plugin.bench.timing import graph_time

HEADS, WIDTH, REPEATS = 32, 128, 3


def measure(tokens: int, activation: str) -> dict[str, object]:
    """Every call has buffers of its own in turn."""
    from sglang.kernels.ops.attention.fla.fused_norm_gate import layer_norm_gated_fwd

    w = torch.randn(WIDTH, device="cuda", dtype=torch.bfloat16)
    sets = [torch.randn(2, tokens * HEADS, WIDTH, device="cuda", dtype=torch.bfloat16) for _ in range(8)]
    theirs = [partial(layer_norm_gated_fwd, x, z, w, None, activation, 1e-6, is_rms_norm=True) for x, z in sets]
    ours = [partial(rmsnorm_fn, x, w, None, z, 1e-6, activation=activation) for x, z in sets]
    expected, got = ours[0](), theirs[0]()[0]  # theirs writes into x, which ours has read by now
    ulps = (expected.view(torch.int16).int() - got.view(torch.int16).int()).abs().max().item()
    times = [(graph_time(theirs).median, graph_time(ours).median) for _ in range(REPEATS)]
    sglang, mine = (statistics.median(side) for side in zip(*times, strict=True))
    return {
        "tokens": tokens, "activation": activation, "largest_difference_in_ulps": ulps,
        "sglang_us": sglang, "ours_us": mine, "ratio": sglang / mine,
    }  # fmt: skip


if __name__ == "__main__":
    options = records.parser(__doc__, "sglang_gate").parse_args()
    rows = [measure(tokens, gate) for gate in ("silu", "sigmoid") for tokens in (1, 2, 4, 8, 16, 32, 64, 128, 512)]
    print(*rows, sep="\n")
    records.write(options.json, rows)
