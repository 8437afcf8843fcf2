"""The fixes of patches/ on a GPU: stock and patched, for equality and time.

    python -m benchmarks.patches --engine vllm   --site DIR [--json FILE]
    python -m benchmarks.patches --engine sglang --site DIR [--json FILE]

DIR is the folder that the engine's package lies in, which must be importable (PYTHONPATH). The patches are applied to
it and taken back. Each side is a process of its own; a call is timed as a replayed CUDA graph, the median of 20
replays of 20 calls.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import records
from norm_plugin.bench.timing import graph_time
from norm_plugin.patching import site, work

ROWS = (1, 16, 64, 512, 4096)
FIXES = {"vllm": ("mixer2-groups", "strided-gate"), "sglang": ("deterministic-add",)}

Case = tuple[str, Callable[[], Any]]


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def vllm_cases() -> Iterator[Case]:
    from vllm.model_executor.layers.mamba.mamba_mixer2 import Mixer2RMSNormGated
    from vllm.third_party.flash_linear_attention.ops.layernorm_guard import rmsnorm_fn

    for rows in ROWS:
        layer = types.SimpleNamespace(
            use_rms_norm=True, n_groups=8, tp_size=1, tp_rank=0, group_size=1024, variance_epsilon=1e-5,
            weight=drawn(8192), per_rank_hidden_size=8192,
        )  # fmt: skip
        layer.forward_native = types.MethodType(Mixer2RMSNormGated.forward_native, layer)
        x, gate = drawn(rows, 8192), drawn(rows, 2 * 8192)[:, 8192:]
        yield f"mixer2-groups, {rows} x 8192 in 8 groups", partial(Mixer2RMSNormGated.forward_cuda, layer, x, gate)
        weight, heads = drawn(128), drawn(rows, 32, 128)
        z = drawn(rows, 12288)[:, 8192:].unflatten(-1, (32, 128))
        yield f"strided-gate, {rows} x 32 x 128", partial(rmsnorm_fn, heads, weight, None, z=z, eps=1e-6)


def sglang_cases() -> Iterator[Case]:
    from sglang.srt.layers import layernorm

    target = types.SimpleNamespace(deterministic=types.SimpleNamespace(rl_on_policy_target=None))
    layernorm.is_batch_invariant_mode_enabled = lambda: True  # as --enable-deterministic-inference has it
    layernorm.get_exec = lambda: target
    for width in (4096, 8192):
        layer = layernorm.RMSNorm(width, eps=1e-6).to("cuda", torch.bfloat16)
        layer.weight.data = drawn(width)
        for rows in ROWS:
            x, residual = drawn(rows, width), drawn(rows, width)
            yield f"deterministic-add, {rows} x {width}", partial(layer.forward_cuda, x, residual)


def measured(engine: str) -> dict[str, dict[str, Any]]:
    """Of each case the time, a digest of the result's bits, and its norm, as a patch may change bits."""
    found = {}
    with torch.inference_mode():
        torch.manual_seed(0)
        for name, call in {"vllm": vllm_cases, "sglang": sglang_cases}[engine]():
            result = call()
            tensors = result if isinstance(result, tuple) else (result,)
            bits = b"".join(t.contiguous().view(torch.uint8).cpu().numpy().tobytes() for t in tensors)
            digest = hashlib.sha256(bits).hexdigest()
            microseconds = graph_time([call], replays=20, launches=20).median
            found[name] = {"us": microseconds, "bits": digest, "norm": tensors[0].float().norm().item()}
    return found


def side(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What is measured in a process of its own."""
    again = [sys.executable, "-m", "benchmarks.patches", "--measure", "--engine", options.engine]
    said = subprocess.run([*again, "--site", options.site], check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, dict[str, Any]] = json.loads(said.splitlines()[-1])
    return found


def main() -> None:
    parser = records.parser(__doc__, "patches")
    parser.add_argument("--engine", choices=FIXES, required=True)
    parser.add_argument("--site", type=Path, required=True)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measured(options.engine)))
        return
    engine = site.find(options.engine, options.site)
    stock = side(options)
    work.apply(engine, FIXES[options.engine])
    try:
        patched = side(options)
    finally:
        work.revert(engine)
    rows = [{"case": name, "stock": before, "patched": patched[name]} for name, before in stock.items()]
    records.write(options.json, rows, engine=options.engine, version=engine.version)
    print(f"{options.engine} {engine.version} on {torch.cuda.get_device_name()}")
    for name, before in stock.items():
        after = patched[name]
        same = before["bits"] == after["bits"]
        bits = "the same bits" if same else f"norm {after['norm'] / before['norm']:.6f} of stock's"
        print(f"{name:45} {before['us']:8.2f} us  {after['us']:8.2f} us  {before['us'] / after['us']:5.2f}x  {bits}")


if __name__ == "__main__":
    main()
