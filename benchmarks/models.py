"""Models of published widths with random weights of the engine's own: a config, and nothing to read."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from norm_plugin.tiny_models.architectures import ARCHITECTURES
from norm_plugin.verify.vllm_worker import Worker as Reporting

VOCAB, POSITIONS = 32000, 4096

LLAMA = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
QWEN3 = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "rope_theta": 1e6}
MAMBA2 = {"hidden_size": 4096, "num_heads": 128, "head_dim": 64, "state_size": 128, "expand": 2, "chunk_size": 256}
#: Widths by model, of which the architecture is the first word.
PUBLISHED: dict[str, dict[str, Any]] = {
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
    "qwen3-0.6b": {**QWEN3, "hidden_size": 1024, "intermediate_size": 3072},
    "qwen3-1.7b": {**QWEN3, "hidden_size": 2048, "intermediate_size": 6144},
    "qwen3-7b": {
        **QWEN3, "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4,
    },
    "gemma3-1b": {
        "hidden_size": 1152, "intermediate_size": 6912, "num_attention_heads": 4, "num_key_value_heads": 1,
        "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 512,
    },
}  # fmt: skip
NEMOTRON_PATTERN = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"  # of the 8B, whose layers are 52

#: What same_output and speed run where nobody says what.
WIDTHS = (
    "llama", "gemma3", "nemotron_h", "mamba2_groups", "qwen3", "qwen3_next", "falcon_h1", "gpt2", "mamba2",
)  # fmt: skip
TINY = [f"tiny:{name}" for name in (
    "llama", "qwen3", "gemma3", "gpt2", "qwen3_next", "qwen3_5", "nemotron_h", "falcon_h1",
)]  # fmt: skip


def layers_of(architecture: str, layers: int) -> dict[str, Any]:
    """How a config says that there are this many layers."""
    found: dict[str, Any] = {"num_hidden_layers": layers}
    if architecture == "gpt2":
        found["n_layer"] = layers
    elif architecture == "nemotron_h":
        found["hybrid_override_pattern"] = NEMOTRON_PATTERN[:layers]
    elif architecture == "gemma3":
        found["layer_types"] = ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(layers)]
    elif architecture == "qwen3_next":
        found["layer_types"] = ["full_attention" if i % 4 == 3 else "linear_attention" for i in range(layers)]
    return found


def write(model: str, layers: int | None, folder: Path) -> Path:
    """Its folder, without weights."""
    architecture, _, size = model.partition("-")
    number = layers or {"qwen3": 28, "gemma3": 26}[architecture] if size else layers or 8
    config = dict(ARCHITECTURES[architecture].config)
    config |= {"vocab_size": VOCAB, "max_position_embeddings": POSITIONS}
    config |= PUBLISHED[model] | layers_of(architecture, number)
    if architecture == "gpt2":
        config["n_positions"] = POSITIONS
    place = folder / model
    place.mkdir(parents=True, exist_ok=True)
    (place / "config.json").write_text(json.dumps(config))
    return place


def of_engine(engine: str, model: str) -> dict[str, Any]:
    """The arguments of an engine for a published model. `dummy` weights are random in SGLang and nearly 0 in vLLM,
    where the Worker makes them random."""
    given: dict[str, Any] = {"load_format": "dummy"}
    if engine == "sglang":
        return given | {"context_length": 2048}
    given |= {"max_model_len": 2048, "worker_extension_cls": "benchmarks.models.Worker"}
    return given | ({"gdn_prefill_backend": "triton"} if model == "qwen3_next" else {})


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
