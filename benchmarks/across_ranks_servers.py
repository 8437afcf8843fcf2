"""A server on several GPUs, stock against patched: tokens a second of decoding, in all modes of the engine.

    PYTHONPATH=<the engine and what it needs>:. python -m benchmarks.across_ranks_servers vllm|sglang [--tp 4] ...

It is speed.py with other defaults: widths of Qwen3-8B in 12 layers, and no prefill. What stood beside each norm, and
how many sums were completed in one, is among the calls of each result. SGLang's deterministic mode wants sgl-deep-gemm;
without it a slow product of matrices hides everything else.
"""

from __future__ import annotations

import os

from benchmarks import speed
from benchmarks.lab import Lab

#: What no machine may do to the others of its host (NVLink multicast), and what takes minutes to compile.
ALWAYS = {
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NCCL_NVLS_ENABLE": "0",
    "VLLM_FLASHINFER_ALLREDUCE_BACKEND": "trtllm",
    "SGLANG_JIT_DEEPGEMM_PRECOMPILE": "0",
}

if __name__ == "__main__":
    parser = speed.parser(__doc__)
    parser.set_defaults(tp=2, layers=12, batch=[1, 8, 32, 64], prefill=[], repeats=1, processes=2)
    for name, value in ALWAYS.items():
        os.environ.setdefault(name, value)
    Lab("across_ranks_servers", parser.parse_args()).run(speed.measure, ["qwen3"])
