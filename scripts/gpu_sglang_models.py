"""The models that scripts/gpu_sglang.py times: a config of a published size, and no weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from norm_plugin.tiny_models.architectures import ARCHITECTURES

QWEN3 = {"0.6b": (1024, 3072, 16, 8), "1.7b": (2048, 6144, 16, 8), "7b": (3584, 18944, 28, 4), "tiny": (64, 128, 2, 1)}


def config_only(folder: Path, config: dict[str, Any]) -> Path:
    """A model without weights: SGLang makes random ones, the same every time."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def qwen3(folder: Path, shape: str, cpu: bool) -> Path:
    hidden, inner, heads, kv_heads = QWEN3["tiny" if cpu else shape]
    config = ARCHITECTURES["qwen3"].config | {
        "hidden_size": hidden, "intermediate_size": inner,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "head_dim": 32 if cpu else 128, "num_hidden_layers": 2 if cpu else 28, "vocab_size": 32000,
        "max_position_embeddings": 4096, "rope_theta": 1e6,
    }  # fmt: skip
    return config_only(folder / f"qwen3-{shape}", config)


def gemma3(folder: Path, cpu: bool) -> Path:
    layers = 2 if cpu else 26
    config = ARCHITECTURES["gemma3"].config | {
        "num_hidden_layers": layers, "vocab_size": 32000, "max_position_embeddings": 4096, "sliding_window": 512,
        "layer_types": ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(layers)],
    }  # fmt: skip
    if not cpu:  # Gemma 3 1B
        config |= {"hidden_size": 1152, "intermediate_size": 6912, "num_attention_heads": 4, "num_key_value_heads": 1,
                   "head_dim": 256, "query_pre_attn_scalar": 256}  # fmt: skip
    return config_only(folder / "gemma3-1b", config)
