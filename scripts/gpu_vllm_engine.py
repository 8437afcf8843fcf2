"""One vLLM engine for scripts/gpu_vllm.py: it makes a model of a realistic width with random weights, then obeys.

Orders come on standard input and answers go to a file descriptor, one JSON a line.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from norm_plugin.tiny_models.architectures import ARCHITECTURES
from norm_plugin.verify.vllm_worker import Worker as Reporting

VOCAB = 32000

#: Published widths, and few layers; `layers` may be changed on the command line.
LLAMA = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
MAMBA2 = {"hidden_size": 4096, "num_heads": 128, "head_dim": 64, "state_size": 128, "expand": 2, "chunk_size": 256}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {**LLAMA, "hidden_size": 4096, "intermediate_size": 14336},
    "qwen3": {**LLAMA, "hidden_size": 4096, "intermediate_size": 12288},
    "gemma3": {
        "hidden_size": 3840, "intermediate_size": 15360, "num_attention_heads": 16, "num_key_value_heads": 8,
        "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 1024,
    },
    "gpt2": {"hidden_size": 1600, "n_embd": 1600, "n_head": 25, "n_inner": 6400, "num_attention_heads": 25},
    "mamba2": {**MAMBA2, "hidden_size": 2560, "num_heads": 80, "n_groups": 1, "intermediate_size": 5120},
    "mamba2_groups": {**MAMBA2, "n_groups": 8, "intermediate_size": 8192},
    "qwen3_next": {
        "hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256,
        "intermediate_size": 5120, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
        "linear_num_key_heads": 16, "linear_num_value_heads": 32, "num_experts": 16, "num_experts_per_tok": 4,
        "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512, "partial_rotary_factor": 0.25,
    },
    "nemotron_h": {
        **LLAMA, "hidden_size": 4096, "intermediate_size": 21504, "mamba_num_heads": 128, "mamba_head_dim": 64,
        "n_groups": 8, "mamba_n_groups": 8, "ssm_state_size": 128, "chunk_size": 256,
    },
    "falcon_h1": {
        "hidden_size": 3072, "intermediate_size": 12288, "num_attention_heads": 12, "num_key_value_heads": 2,
        "head_dim": 128, "mamba_d_ssm": 6144, "mamba_n_heads": 96, "mamba_d_head": 64, "mamba_n_groups": 2,
        "mamba_d_state": 128, "mamba_expand": 2, "mamba_chunk_size": 256,
    },
}  # fmt: skip
NEMOTRON_PATTERN = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"  # of the 8B, whose layers are 52


def layers_of(family: str, layers: int) -> dict[str, Any]:
    """How a config says that there are this many layers."""
    if family == "gpt2":
        return {"n_layer": layers, "num_hidden_layers": layers}
    if family == "nemotron_h":
        pattern = NEMOTRON_PATTERN[:layers]
        return {"num_hidden_layers": layers, "hybrid_override_pattern": pattern}
    if family == "gemma3":
        kinds = ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(layers)]
        return {"num_hidden_layers": layers, "layer_types": kinds}
    if family == "qwen3_next":
        kinds = ["full_attention" if i % 4 == 3 else "linear_attention" for i in range(layers)]
        return {"num_hidden_layers": layers, "layer_types": kinds}
    return {"num_hidden_layers": layers}


def write_config(family: str, layers: int, folder: Path) -> None:
    """A folder without weights: layers 0 is the tiny model as it is."""
    config = dict(ARCHITECTURES[family].config)
    if layers:
        config |= {"vocab_size": VOCAB, "max_position_embeddings": 4096, **SHAPES[family], **layers_of(family, layers)}
        if family == "gpt2":
            config["n_positions"] = 4096
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))


def spread(module: nn.Module, name: str, p: Tensor) -> tuple[float, float]:
    """(mean, deviation) of a parameter that makes a model whose norms matter."""
    kind = type(module).__name__
    if "Norm" in kind:
        return (0.1, 0.1) if name == "bias" else (0.0, 0.2) if "Gemma" in kind else (1.0, 0.2)
    if name == "A":
        return -4.0, 1.0
    if name == "dt_bias":
        return -2.0, 0.5
    if name in ("A_log", "D"):
        return 1.0, 0.3
    if "Embedding" in kind or "LMHead" in kind:
        return 0.0, 2.0 / p.shape[-1] ** 0.5
    return (0.0, 0.05) if p.dim() < 2 else (0.0, 1.0 / p.shape[-1] ** 0.5)


class Worker(Reporting):
    """Methods for vLLM's worker."""

    model_runner: Any

    @torch.no_grad()
    def randomise(self) -> None:
        """The same weights in every process: each parameter's come from its name."""
        for where, module in self.model_runner.get_model().named_modules():
            for name, p in module.named_parameters(recurse=False):
                mean, deviation = spread(module, name, p)
                generator = torch.Generator(p.device).manual_seed(zlib.crc32(f"{where}.{name}".encode()))
                p.copy_(torch.randn(p.shape, generator=generator, device=p.device) * deviation + mean)


def start(wanted: dict[str, Any], folder: Path) -> Any:
    """The engine."""
    import vllm

    given: dict[str, Any] = {
        "model": str(folder), "load_format": "dummy", "dtype": "bfloat16", "seed": 0, "skip_tokenizer_init": True,
        "enforce_eager": wanted["mode"] == "eager", "max_model_len": 512, "max_num_seqs": wanted["batch"],
        "max_num_batched_tokens": wanted["at_once"], "enable_prefix_caching": False, "disable_log_stats": True,
        "kv_cache_memory_bytes": (wanted["cache_gib"] << 30) if wanted["device"] == "cuda" else (64 << 20),
        "worker_extension_cls": "gpu_vllm_engine.Worker",
    }  # fmt: skip
    if wanted["device"] == "cuda":
        sizes = [1, 2, 4, 8, 16, 32, 64]
        given |= {
            "attention_backend": "TRITON_ATTN", "gpu_memory_utilization": 0.15,
            "compilation_config": {"cudagraph_capture_sizes": [n for n in sizes if n <= wanted["batch"]]},
        }  # fmt: skip
        if wanted["family"] == "qwen3_next":
            given["gdn_prefill_backend"] = "triton"
    llm = vllm.LLM(**given)
    llm.collective_rpc("randomise")
    llm.collective_rpc("norm_plugin_forget")
    return llm


def about() -> dict[str, Any]:
    """With what this is found out."""
    import triton
    import vllm

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    versions = {"torch": torch.__version__, "triton": triton.__version__, "vllm": vllm.__version__}
    return {"gpu": gpu, "python": platform.python_version(), **versions}


def prompts(count: int, length: int, vocab: int) -> list[dict[str, list[int]]]:
    """Always the same; their lengths differ."""
    generator = torch.Generator().manual_seed(count)
    sizes = [length + (7 * i) % length for i in range(count)]
    return [{"prompt_token_ids": torch.randint(3, vocab - 8, (n,), generator=generator).tolist()} for n in sizes]


def answers(llm: Any, order: dict[str, Any]) -> list[dict[str, Any]]:
    """Greedy tokens with their logprobs, and the logprob of every token of the prompt."""
    from vllm import SamplingParams

    asked = prompts(order["count"], order["length"], order["vocab"])
    places = list(range(len(asked)))
    batches = {"given": [places], "reversed": [places[::-1]], "alone": [[i] for i in places]}[order["order"]]
    how = SamplingParams(
        temperature=0, max_tokens=order["tokens"], logprobs=1, prompt_logprobs=0, ignore_eos=True, detokenize=False
    )
    found: list[dict[str, Any]] = [{}] * len(asked)
    for batch in batches:
        for place, output in zip(batch, llm.generate([asked[i] for i in batch], how, use_tqdm=False), strict=True):
            tokens = list(output.outputs[0].token_ids)
            given = output.prompt_token_ids[1:]
            found[place] = {
                "tokens": tokens,
                "logprobs": [at[t].logprob for t, at in zip(tokens, output.outputs[0].logprobs, strict=True)],
                "prompt": [at[t].logprob for t, at in zip(given, output.prompt_logprobs[1:], strict=True)],
            }
    return found


def decode(llm: Any, order: dict[str, Any]) -> list[float]:
    """The seconds of one step of a batch, and of `tokens` steps more."""
    from vllm import SamplingParams

    asked = prompts(order["count"], 16, order["vocab"])
    times = []
    for tokens in (1, order["tokens"] + 1):
        how = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        begin = time.perf_counter()
        llm.generate(asked, how, use_tqdm=False)
        times.append(time.perf_counter() - begin)
    return times


def report(llm: Any, order: dict[str, Any]) -> dict[str, Any]:
    """What was hooked, and how often each op was counted."""
    (found,) = llm.collective_rpc("norm_plugin_report")
    calls: dict[str, int] = {}
    for row in found.pop("rows"):
        name = " ".join(filter(None, (row["class"], row["op"], row["reason"])))
        calls[name] = calls.get(name, 0) + row["calls"]
    return {**found, "calls": calls}


def main() -> None:
    wanted, out = json.loads(sys.argv[1]), os.fdopen(int(sys.argv[2]), "w", buffering=1)
    folder = Path(wanted["folder"]) / f"{wanted['family']}-{wanted['layers']}"
    write_config(wanted["family"], wanted["layers"], folder)
    begin = time.perf_counter()
    llm = start(wanted, folder)
    say: Callable[..., Any] = partial(print, file=out, flush=True)
    say(json.dumps({"started": time.perf_counter() - begin, "about": about()}))
    vocab = VOCAB if wanted["layers"] else ARCHITECTURES[wanted["family"]].config["vocab_size"]
    for line in sys.stdin:
        order = json.loads(line) | {"vocab": vocab}
        do = {"answers": answers, "decode": decode, "report": report}[order["do"]]
        say(json.dumps(do(llm, order)))
    llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
