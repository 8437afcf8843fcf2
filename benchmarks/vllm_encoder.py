"""The norms of a qwen2.5-vl vision encoder in vLLM's default mode: two RMSNorms a block, eager, and one at the end.

PYTHONPATH=<vLLM and what it needs>:. python -m benchmarks.vllm_encoder [--json FILE]
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from benchmarks import records
from norm_plugin import settings
from norm_plugin.engines import call_counts
from norm_plugin.engines import vllm as adapter


def layers(width: int, blocks: int, device: str) -> list[tuple[Any, Any]]:
    """vLLM's own, as its encoder makes them under torch.compile: `custom_ops` is none, the IR's priority native."""
    from vllm.config import CompilationConfig, VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.layernorm import RMSNorm

    config = VllmConfig(compilation_config=CompilationConfig(custom_ops=["none"]))
    config.kernel_config.ir_op_priority.set_default()
    with set_current_vllm_config(config), torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        return [(RMSNorm(width, eps=1e-6), RMSNorm(width, eps=1e-6)) for _ in range(blocks)]


def encode(norms: list[tuple[Any, Any]], x: torch.Tensor, attended: list[torch.Tensor]) -> torch.Tensor:
    """Only the norms. They write x and what attention returned, so each pass needs new ones."""
    for (first, second), residual in zip(norms, attended, strict=True):
        first(x)
        x, _ = second(x, residual=residual)
    return x


class Passes:
    """Passes through the encoder, each on the same values."""

    def __init__(self, norms: list[tuple[Any, Any]], patches: int, width: int, device: str) -> None:
        make = torch.Generator(device).manual_seed(patches)
        shape = (patches, width)
        self.norms = norms
        self.values = [torch.randn(shape, generator=make, device=device, dtype=torch.bfloat16) for _ in range(2)]
        self.given = [torch.empty_like(self.values[0]) for _ in range(len(norms) + 1)]
        self.wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def milliseconds(self) -> float:
        """From the first launch to the last result."""
        self.given[0].copy_(self.values[0])
        for residual in self.given[1:]:
            residual.copy_(self.values[1])
        self.wait()
        begin = time.perf_counter()
        self.out = encode(self.norms, self.given[0], self.given[1:])
        self.wait()
        return (time.perf_counter() - begin) * 1e3


def compared(passes: Passes, ours: str) -> dict[str, Any]:
    """Stock and patched in turns, after a first turn that does not count; `ours` is the backend."""
    times: dict[str, list[float]] = {"stock": [], "patched": []}
    outputs = {}
    for turn in range(7):
        for side in times:
            with settings.override(backend=ours if side == "patched" else "off"):
                adapter.register()
                taken = [passes.milliseconds() for _ in range(23)][3:]
                outputs[side] = passes.out.float()
                adapter.undo()
            if turn:
                times[side].append(statistics.median(taken))
    medians = {side: statistics.median(found) for side, found in times.items()}
    off = (outputs["stock"] - outputs["patched"]).abs().max().item()
    return {
        "ratio": medians["stock"] / medians["patched"], "ms": medians, "all_ms": times,
        "largest_difference": off, "largest_value": outputs["stock"].abs().max().item(),
    }  # fmt: skip


def main() -> None:
    parser = records.parser(__doc__, "vllm_encoder")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: a rehearsal")
    options = parser.parse_args()
    cuda = options.device == "cuda"
    width, blocks = (1280, 32) if cuda else (64, 2)
    norms = layers(width, blocks, options.device)
    rows = []
    with torch.inference_mode():
        for patches in (256, 1024, 4096, 16384) if cuda else (8,):
            found = compared(Passes(norms, patches, width, options.device), "auto" if cuda else "native")
            rows.append({"patches": patches, **found})
            print(patches, "patches:", found["ms"], flush=True)
    from vllm import ir

    calls = {op: call_counts.calls(op) for op in ("rmsnorm", "fused_add_rmsnorm")}
    priority = ir.ops.rms_norm.get_priority()
    records.write(options.json, rows, width=width, blocks=blocks, ir_priority=priority, calls=calls)


if __name__ == "__main__":
    main()
