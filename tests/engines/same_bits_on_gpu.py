"""The real engine's patched norm layers and the trainer's layers: the same bits, on this machine's GPU.

    PYTHONPATH=<the engine and what it needs>:. python -m tests.engines.same_bits_on_gpu vllm|sglang [--json FILE]

Each layer class and gated function of the engine is called in inference mode, and `norm_plugin.layers` with the same
weights, the numerics that the adapter chose, and gradients recorded. A line says for each family which numerics ran,
on what, whether all outputs are torch.equal, whether the gradients are finite, and that other numerics give other bits.
The exit code is 1 if anything is wrong. `--device cpu` is a rehearsal: native norms, and for SGLang the way of a GPU.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import records
from norm_plugin import settings
from tests.engines.same_bits import Case, Found, compare

#: (rows, width): a decode step and a prefill; heads; no power of two; wider than registers. Three groups divide them.
SHAPES = ((64, 6144), (2048, 3072), (4096, 96), (33, 2880), (4, 36864))
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

#: What a part of a run is called, and its cases from rows, width and dtype.
Part = tuple[str, Callable[..., Iterator[Any]]]


def vllm_parts(device: str) -> Iterator[Part]:
    """With vLLM's CUDA kernels as what is replaced, and with its native path, as under its torch.compile."""
    from vllm.config import CompilationConfig, VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel

    from norm_plugin.engines import vllm as adapter
    from norm_plugin.engines.installed_hooks import installed
    from tests.engines.vllm_inside import trained

    for number, ops in enumerate(("all", "none")):
        config = VllmConfig(compilation_config=CompilationConfig(custom_ops=[ops]))
        config.kernel_config.ir_op_priority.set_default()
        with set_current_vllm_config(config):
            if not number:
                init_distributed_environment(1, 0, "tcp://127.0.0.1:29717", 0, "gloo" if device == "cpu" else "nccl")
                initialize_model_parallel(1, 1)
            adapter.register()
            print(installed["vllm"].line(), "missing:", installed["vllm"].missing)
            yield f"vLLM, custom ops {ops}", trained.cases
            adapter.undo()


def sglang_parts(device: str) -> Iterator[Part]:
    from norm_plugin.engines import sglang as adapter
    from norm_plugin.engines import sglang_norms
    from norm_plugin.engines.installed_hooks import InstalledHooks, installed

    record = None
    if device == "cpu":  # what a GPU would run is taken by hand
        import sglang.srt.layers.layernorm as norms
        from sglang.kernels.ops.attention.fla import fused_norm_gate, layernorm_gated

        from norm_plugin.engines import sglang_gated

        norms.is_batch_invariant_mode_enabled = lambda: False
        record = InstalledHooks("sglang", "as installed")
        record.live["(begun)"] = "here"
        sglang_norms.hook(norms, record, "forward_cuda")
        sglang_gated.hook_layernorm_gated(layernorm_gated, record)
        sglang_gated.hook_fused_norm_gate(fused_norm_gate, record)
    else:
        adapter.register()
    from tests.engines.sglang_inside import trained

    record = record or installed["sglang"]
    print(record.line(), "missing:", record.missing)
    yield "SGLang", partial(trained.cases, method="forward_cuda")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=("vllm", "sglang"))
    parser.add_argument("--json", type=Path, help="write what was found there")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: %(default)s")
    options = parser.parse_args()
    os.environ |= {"TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    if options.device == "cpu":
        os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
    torch.manual_seed(0)
    parts = vllm_parts if options.engine == "vllm" else sglang_parts
    shapes = SHAPES if options.device == "cuda" else ((33, 96),)
    found = []
    with settings.override(backend="triton" if options.device == "cuda" else "native", strict=True):
        for part, cases in parts(options.device):
            for rows, width in shapes:
                for dtype in DTYPES:
                    with torch.device(options.device):
                        made = [attempt(case) for case in cases(rows, width, dtype)]
                    found += [{"part": part, "rows": rows, "width": width, **asdict(one)} for one in made]
    show(found)
    wrong = [one for one in found if one["wrong"]]
    if options.json:
        records.write(options.json, found)
    for one in wrong:
        print("WRONG", one)
    print(f"{len(found) - len(wrong)} of {len(found)} calls have the bits of the engine")
    return 1 if wrong or not found else 0


def attempt(case: Case) -> Found:
    """A case that fails is wrong, and the others go on."""
    try:
        return compare(case)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        return Found(case.name, str(case.inputs[0].dtype), wrong=[f"{type(error).__name__}: {error}"])


def show(found: list[dict[str, Any]]) -> None:
    """A line for each family and numerics."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for one in found:
        backends = " and ".join(dict.fromkeys(one["backends"]))
        groups.setdefault((one["part"], one["name"], one["numerics"], backends), []).append(one)
    for (part, name, numerics, backends), calls in groups.items():
        equal = sum(not one["wrong"] for one in calls)
        control = Counter(one["other_numerics_differ"] for one in calls)
        dtypes = " ".join(dict.fromkeys(one["dtype"] for one in calls))
        print(
            f"{part:24} {name:44} {numerics:9} {backends:8} {equal}/{len(calls)} equal; "
            f"other numerics differ in {control[True]} of {control[True] + control[False]}; {dtypes}"
        )


if __name__ == "__main__":
    sys.exit(main())
