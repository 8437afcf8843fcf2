"""The architectures of the tiny models: a config as published checkpoints have it, and the shape of each tensor.

Each model has the norms that its big brothers have: q and k norms, Gemma's 1 + w, gated norms with one group and with
several.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from norm_plugin.tiny_models import shapes
from norm_plugin.tiny_models.shapes import CONV, LAYERS, TINY, VOCAB, Shapes, Sizes

BOS, EOS, PAD = 256, 257, 258


@dataclass(frozen=True)
class Architecture:
    """One tiny model. `one_plus`: its norms multiply by 1 + w; `tied`: no lm_head, logits from the embedding."""

    config: dict[str, Any]
    shapes: Shapes
    one_plus: bool = False
    tied: bool = False
    engines: tuple[str, ...] = ("vllm", "sglang")


def _config(s: Sizes, architecture: str, model_type: str, **fields: Any) -> dict[str, Any]:
    return {
        "architectures": [architecture], "model_type": model_type, "vocab_size": VOCAB, "hidden_size": s.hidden,
        "max_position_embeddings": shapes.POSITIONS, "torch_dtype": "bfloat16", "bos_token_id": BOS,
        "eos_token_id": EOS, "pad_token_id": PAD, **fields,
    }  # fmt: skip


def _mamba2(s: Sizes, groups: int) -> Architecture:
    config = _config(
        s, "Mamba2ForCausalLM", "mamba2", num_hidden_layers=shapes.MAMBA_LAYERS, num_heads=s.mamba_heads,
        head_dim=s.mamba_head, state_size=s.state, n_groups=groups, conv_kernel=CONV, expand=s.mamba // s.hidden,
        chunk_size=64, hidden_act="silu", layer_norm_epsilon=1e-5, use_bias=False, use_conv_bias=True,
        rms_norm=True, residual_in_fp32=True, time_step_rank=8, time_step_limit=[0.0, 1e9], tie_word_embeddings=False,
        # SGLang reads these of every model
        num_attention_heads=s.mamba_heads, num_key_value_heads=s.mamba_heads, intermediate_size=s.mamba,
    )  # fmt: skip
    return Architecture(config, shapes.mamba2(s, groups))


@cache
def architectures(s: Sizes) -> dict[str, Architecture]:
    """All of them, by name, in these sizes."""
    attention = {  # what all models with Llama's attention and MLP say of them
        "num_attention_heads": s.heads, "num_key_value_heads": s.kv_heads, "head_dim": s.head,
        "num_hidden_layers": LAYERS, "intermediate_size": s.inner, "hidden_act": "silu", "attention_bias": False,
        "attention_dropout": 0.0, "rope_theta": 10000.0,
    }  # fmt: skip
    gemma = {
        **attention, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6,
        "query_pre_attn_scalar": s.head, "sliding_window": 64, "tie_word_embeddings": True,
    }  # fmt: skip
    untied = {**attention, "tie_word_embeddings": False}
    gated_delta = {
        **untied, "num_hidden_layers": len(shapes.QWEN_LAYERS), "layer_types": list(shapes.QWEN_LAYERS),
        "rms_norm_eps": 1e-6, "partial_rotary_factor": 0.5, "full_attention_interval": len(shapes.QWEN_LAYERS),
        "linear_conv_kernel_dim": CONV, "linear_key_head_dim": s.linear_head, "linear_value_head_dim": s.linear_head,
        "linear_num_key_heads": s.linear_k_heads, "linear_num_value_heads": s.linear_v_heads,
    }  # fmt: skip

    return {
        "llama": Architecture(
            _config(s, "LlamaForCausalLM", "llama", **untied, rms_norm_eps=1e-5, mlp_bias=False),
            shapes.transformer(s, shapes.TWO, qk_norm=False, tied=False),
        ),
        "qwen3": Architecture(
            _config(s, "Qwen3ForCausalLM", "qwen3", **untied, rms_norm_eps=1e-6),
            shapes.transformer(s, shapes.TWO, qk_norm=True, tied=False),
        ),
        "gemma2": Architecture(
            _config(
                s, "Gemma2ForCausalLM", "gemma2", **gemma, attn_logit_softcapping=50.0, final_logit_softcapping=30.0
            ),
            shapes.transformer(s, shapes.FOUR, qk_norm=False, tied=True), one_plus=True, tied=True,
        ),
        "gemma3": Architecture(
            _config(
                s, "Gemma3ForCausalLM", "gemma3_text", **gemma, rope_local_base_freq=10000.0,
                layer_types=["sliding_attention", "sliding_attention", "full_attention"],
            ),
            shapes.transformer(s, shapes.FOUR, qk_norm=True, tied=True), one_plus=True, tied=True,
        ),
        "gpt2": Architecture(
            _config(
                s, "GPT2LMHeadModel", "gpt2", n_embd=s.hidden, n_layer=LAYERS, n_head=s.heads,
                n_positions=shapes.POSITIONS, n_inner=s.inner, activation_function="gelu_new", layer_norm_epsilon=1e-5,
                tie_word_embeddings=True,
            ),
            shapes.gpt2(s), tied=True,
        ),
        "mamba2": _mamba2(s, groups=1),
        "mamba2_groups": _mamba2(s, groups=2),
        "qwen3_next": Architecture(
            _config(
                s, "Qwen3NextForCausalLM", "qwen3_next", **gated_delta, num_experts=shapes.EXPERTS,
                num_experts_per_tok=2, moe_intermediate_size=s.expert, shared_expert_intermediate_size=s.expert,
                norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[], router_aux_loss_coef=0.001,
            ),
            shapes.gated_delta(s, {"qkvz": 2 * s.keys + 2 * s.values, "ba": 2 * s.linear_v_heads}, shapes.experts),
            one_plus=True,
        ),
        "qwen3_5": Architecture(
            _config(
                s, "Qwen3_5ForCausalLM", "qwen3_5_text", **gated_delta,
                rope_parameters={
                    "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5,
                    "mrope_section": [4, 2, 2], "mrope_interleaved": True,
                },
            ),
            shapes.gated_delta(
                s, {"qkv": 2 * s.keys + s.values, "z": s.values, **dict.fromkeys("ba", s.linear_v_heads)}, shapes.mlp
            ),
            one_plus=True, engines=("sglang",),  # vLLM's needs torchvision, which has no build for the CPU
        ),
        "nemotron_h": Architecture(
            _config(
                s, "NemotronHForCausalLM", "nemotron_h", **{**untied, "num_hidden_layers": len(shapes.NEMOTRON_LAYERS)},
                hybrid_override_pattern=shapes.NEMOTRON_LAYERS, mlp_hidden_act="relu2", mamba_hidden_act="silu",
                mamba_num_heads=s.mamba_heads, mamba_head_dim=s.mamba_head, ssm_state_size=s.state,
                n_groups=shapes.NEMOTRON_GROUPS, mamba_n_groups=shapes.NEMOTRON_GROUPS, conv_kernel=CONV,
                expand=s.mamba // s.hidden, chunk_size=64, layer_norm_epsilon=1e-5, rms_norm_eps=1e-5,
                use_bias=False, use_conv_bias=True, mlp_bias=False, mamba_proj_bias=False,
                residual_in_fp32=False, time_step_limit=[0.0, 1e9],
            ),
            shapes.nemotron_h(s),
        ),
        "falcon_h1": Architecture(
            _config(
                s, "FalconH1ForCausalLM", "falcon_h1", **{**untied, "num_hidden_layers": shapes.MAMBA_LAYERS},
                rms_norm_eps=1e-5, mlp_bias=False, projectors_bias=False, mamba_d_ssm=s.mamba,
                mamba_n_heads=s.mamba_heads, mamba_d_head=s.mamba_head, mamba_n_groups=shapes.FALCON_GROUPS,
                mamba_d_state=s.state, mamba_d_conv=CONV, mamba_expand=s.mamba // s.hidden, mamba_chunk_size=64,
                mamba_conv_bias=True, mamba_proj_bias=False, mamba_rms_norm=True, mamba_norm_before_gate=False,
                attention_in_multiplier=1.0, attention_out_multiplier=1.0, embedding_multiplier=1.0, key_multiplier=1.0,
                lm_head_multiplier=1.0, mlp_multipliers=[1.0, 1.0], ssm_in_multiplier=1.0, ssm_out_multiplier=1.0,
                ssm_multipliers=[1.0] * 5,
            ),
            shapes.falcon_h1(s),
        ),
    }  # fmt: skip


ARCHITECTURES = architectures(TINY)
