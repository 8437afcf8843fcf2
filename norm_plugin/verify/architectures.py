"""The architectures of the tiny models: a config as published checkpoints have it, and the shape of each tensor.

Widths are the smallest that both engines run on a CPU: vLLM's attention there wants heads of 32 or more. Each model has
the norms that its big brothers have: q and k norms, Gemma's 1 + w, gated norms with one group and with several.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

VOCAB, BOS, EOS, PAD = 320, 256, 257, 258
HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, HEAD, POSITIONS = 128, 256, 3, 4, 2, 32, 512
MAMBA_LAYERS, MAMBA_HEADS, MAMBA_HEAD, STATE, CONV = 2, 8, 32, 16, 4
MAMBA = MAMBA_HEADS * MAMBA_HEAD

Shapes = Iterator[tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Architecture:
    """One tiny model. `one_plus`: its norms multiply by 1 + w; `tied`: no lm_head, logits from the embedding."""

    config: dict[str, Any]
    shapes: Callable[[], Shapes]
    one_plus: bool = False
    tied: bool = False
    engines: tuple[str, ...] = ("vllm", "sglang")


def _config(architecture: str, model_type: str, **fields: Any) -> dict[str, Any]:
    common = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "max_position_embeddings": POSITIONS,
        "torch_dtype": "bfloat16",
    }
    ids = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    return {"architectures": [architecture], "model_type": model_type, **common, **ids, **fields}


#: What all models with Llama's attention and MLP say of them.
ATTENTION = {
    "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD, "num_hidden_layers": LAYERS,
    "intermediate_size": INNER, "hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0,
    "rope_theta": 10000.0,
}  # fmt: skip


def _linear(name: str, out: int, into: int) -> Shapes:
    yield f"{name}.weight", (out, into)


def _norm(*names: str, width: int = HIDDEN) -> Shapes:
    for name in names:
        yield f"{name}.weight", (width,)


def _attention(at: str, q: int = HEADS * HEAD) -> Shapes:
    yield from _linear(f"{at}.q_proj", q, HIDDEN)
    yield from _linear(f"{at}.k_proj", KV_HEADS * HEAD, HIDDEN)
    yield from _linear(f"{at}.v_proj", KV_HEADS * HEAD, HIDDEN)
    yield from _linear(f"{at}.o_proj", HIDDEN, HEADS * HEAD)


def _mlp(at: str, inner: int = INNER) -> Shapes:
    yield from _linear(f"{at}.gate_proj", inner, HIDDEN)
    yield from _linear(f"{at}.up_proj", inner, HIDDEN)
    yield from _linear(f"{at}.down_proj", HIDDEN, inner)


def _mamba(at: str, groups: int) -> Shapes:
    channels = MAMBA + 2 * groups * STATE
    yield from _linear(f"{at}.in_proj", MAMBA + channels + MAMBA_HEADS, HIDDEN)
    yield f"{at}.conv1d.weight", (channels, 1, CONV)
    yield f"{at}.conv1d.bias", (channels,)
    for name in ("dt_bias", "A_log", "D"):
        yield f"{at}.{name}", (MAMBA_HEADS,)
    yield from _norm(f"{at}.norm", width=MAMBA)
    yield from _linear(f"{at}.out_proj", HIDDEN, MAMBA)


def _transformer(norms: tuple[str, ...], qk_norm: bool, tied: bool) -> Callable[[], Shapes]:
    """Llama and its relatives: they differ in the norms of a layer."""

    def shapes() -> Shapes:
        yield "model.embed_tokens.weight", (VOCAB, HIDDEN)
        for i in range(LAYERS):
            at = f"model.layers.{i}"
            yield from _norm(*(f"{at}.{norm}" for norm in norms))
            yield from _attention(f"{at}.self_attn")
            if qk_norm:
                yield from _norm(f"{at}.self_attn.q_norm", f"{at}.self_attn.k_norm", width=HEAD)
            yield from _mlp(f"{at}.mlp")
        yield from _norm("model.norm")
        if not tied:
            yield "lm_head.weight", (VOCAB, HIDDEN)

    return shapes


TWO = ("input_layernorm", "post_attention_layernorm")
FOUR = (*TWO, "pre_feedforward_layernorm", "post_feedforward_layernorm")


def _gpt2() -> Shapes:
    yield "transformer.wte.weight", (VOCAB, HIDDEN)
    yield "transformer.wpe.weight", (POSITIONS, HIDDEN)
    layers = [f"transformer.h.{i}" for i in range(LAYERS)]
    for at in layers:
        yield f"{at}.attn.c_attn.weight", (HIDDEN, 3 * HIDDEN)
        yield f"{at}.attn.c_attn.bias", (3 * HIDDEN,)
        yield f"{at}.attn.c_proj.weight", (HIDDEN, HIDDEN)
        yield f"{at}.attn.c_proj.bias", (HIDDEN,)
        yield f"{at}.mlp.c_fc.weight", (HIDDEN, INNER)
        yield f"{at}.mlp.c_fc.bias", (INNER,)
        yield f"{at}.mlp.c_proj.weight", (INNER, HIDDEN)
        yield f"{at}.mlp.c_proj.bias", (HIDDEN,)
    for norm in [*(f"{at}.{norm}" for at in layers for norm in ("ln_1", "ln_2")), "transformer.ln_f"]:
        yield from _norm(norm)
        yield f"{norm}.bias", (HIDDEN,)


def _mamba2(groups: int) -> Architecture:
    config = _config(
        "Mamba2ForCausalLM", "mamba2", num_hidden_layers=MAMBA_LAYERS, num_heads=MAMBA_HEADS, head_dim=MAMBA_HEAD,
        state_size=STATE, n_groups=groups, conv_kernel=CONV, expand=MAMBA // HIDDEN, chunk_size=64, hidden_act="silu",
        layer_norm_epsilon=1e-5, use_bias=False, use_conv_bias=True, rms_norm=True, residual_in_fp32=True,
        time_step_rank=8, time_step_limit=[0.0, 1e9], tie_word_embeddings=False,
        # SGLang reads these of every model
        num_attention_heads=MAMBA_HEADS, num_key_value_heads=MAMBA_HEADS, intermediate_size=MAMBA,
    )  # fmt: skip

    def shapes() -> Shapes:
        yield "backbone.embeddings.weight", (VOCAB, HIDDEN)
        for i in range(MAMBA_LAYERS):
            yield from _norm(f"backbone.layers.{i}.norm")
            yield from _mamba(f"backbone.layers.{i}.mixer", groups)
        yield from _norm("backbone.norm_f")
        yield "lm_head.weight", (VOCAB, HIDDEN)

    return Architecture(config, shapes)


QWEN_LAYERS = ("linear_attention", "linear_attention", "linear_attention", "full_attention")
LINEAR_HEAD, LINEAR_K_HEADS, LINEAR_V_HEADS, EXPERTS, EXPERT = 64, 2, 4, 4, 64
KEYS, VALUES = LINEAR_K_HEADS * LINEAR_HEAD, LINEAR_V_HEADS * LINEAR_HEAD


def _experts(at: str) -> Shapes:
    yield from _linear(f"{at}.gate", EXPERTS, HIDDEN)
    for expert in range(EXPERTS):
        yield from _mlp(f"{at}.experts.{expert}", EXPERT)
    yield from _mlp(f"{at}.shared_expert", EXPERT)
    yield from _linear(f"{at}.shared_expert_gate", 1, HIDDEN)


def _gated_delta(into: dict[str, int], mlp: Callable[[str], Shapes]) -> Callable[[], Shapes]:
    """Qwen3-Next and Qwen3.5: they differ in how the projections into linear attention are put together."""

    def shapes() -> Shapes:
        yield "model.embed_tokens.weight", (VOCAB, HIDDEN)
        for i, kind in enumerate(QWEN_LAYERS):
            at = f"model.layers.{i}"
            yield from _norm(*(f"{at}.{norm}" for norm in TWO))
            if kind == "full_attention":
                yield from _attention(f"{at}.self_attn", q=2 * HEADS * HEAD)  # the queries and their gate
                yield from _norm(f"{at}.self_attn.q_norm", f"{at}.self_attn.k_norm", width=HEAD)
            else:
                for name, width in into.items():
                    yield from _linear(f"{at}.linear_attn.in_proj_{name}", width, HIDDEN)
                yield f"{at}.linear_attn.conv1d.weight", (2 * KEYS + VALUES, 1, CONV)
                yield f"{at}.linear_attn.dt_bias", (LINEAR_V_HEADS,)
                yield f"{at}.linear_attn.A_log", (LINEAR_V_HEADS,)
                yield from _norm(f"{at}.linear_attn.norm", width=LINEAR_HEAD)
                yield from _linear(f"{at}.linear_attn.out_proj", HIDDEN, VALUES)
            yield from mlp(f"{at}.mlp")
        yield from _norm("model.norm")
        yield "lm_head.weight", (VOCAB, HIDDEN)

    return shapes


NEMOTRON_LAYERS, NEMOTRON_GROUPS = "M-*-M", 2


def _nemotron_h() -> Shapes:
    yield "backbone.embeddings.weight", (VOCAB, HIDDEN)
    for i, kind in enumerate(NEMOTRON_LAYERS):
        at = f"backbone.layers.{i}"
        yield from _norm(f"{at}.norm")
        if kind == "M":
            yield from _mamba(f"{at}.mixer", NEMOTRON_GROUPS)
        elif kind == "*":
            yield from _attention(f"{at}.mixer")
        else:
            yield from _linear(f"{at}.mixer.up_proj", INNER, HIDDEN)
            yield from _linear(f"{at}.mixer.down_proj", HIDDEN, INNER)
    yield from _norm("backbone.norm_f")
    yield "lm_head.weight", (VOCAB, HIDDEN)


FALCON_GROUPS = 2


def _falcon_h1() -> Shapes:
    yield "model.embed_tokens.weight", (VOCAB, HIDDEN)
    for i in range(MAMBA_LAYERS):
        at = f"model.layers.{i}"
        yield from _norm(f"{at}.input_layernorm", f"{at}.pre_ff_layernorm")
        yield from _mamba(f"{at}.mamba", FALCON_GROUPS)
        yield from _attention(f"{at}.self_attn")
        yield from _mlp(f"{at}.feed_forward")
    yield from _norm("model.final_layernorm")
    yield "lm_head.weight", (VOCAB, HIDDEN)


GEMMA = {
    **ATTENTION, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": HEAD, "sliding_window": 64, "tie_word_embeddings": True,
}  # fmt: skip
UNTIED = {**ATTENTION, "tie_word_embeddings": False}
GATED_DELTA = {
    **UNTIED, "num_hidden_layers": len(QWEN_LAYERS), "layer_types": list(QWEN_LAYERS), "rms_norm_eps": 1e-6,
    "partial_rotary_factor": 0.5, "full_attention_interval": len(QWEN_LAYERS), "linear_conv_kernel_dim": CONV,
    "linear_key_head_dim": LINEAR_HEAD, "linear_value_head_dim": LINEAR_HEAD,
    "linear_num_key_heads": LINEAR_K_HEADS, "linear_num_value_heads": LINEAR_V_HEADS,
}  # fmt: skip

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(
        _config("LlamaForCausalLM", "llama", **UNTIED, rms_norm_eps=1e-5, mlp_bias=False),
        _transformer(TWO, qk_norm=False, tied=False),
    ),
    "qwen3": Architecture(
        _config("Qwen3ForCausalLM", "qwen3", **UNTIED, rms_norm_eps=1e-6),
        _transformer(TWO, qk_norm=True, tied=False),
    ),
    "gemma2": Architecture(
        _config("Gemma2ForCausalLM", "gemma2", **GEMMA, attn_logit_softcapping=50.0, final_logit_softcapping=30.0),
        _transformer(FOUR, qk_norm=False, tied=True), one_plus=True, tied=True,
    ),
    "gemma3": Architecture(
        _config(
            "Gemma3ForCausalLM", "gemma3_text", **GEMMA, rope_local_base_freq=10000.0,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        ),
        _transformer(FOUR, qk_norm=True, tied=True), one_plus=True, tied=True,
    ),
    "gpt2": Architecture(
        _config(
            "GPT2LMHeadModel", "gpt2", n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS, n_positions=POSITIONS,
            n_inner=INNER, activation_function="gelu_new", layer_norm_epsilon=1e-5, tie_word_embeddings=True,
        ),
        _gpt2, tied=True,
    ),
    "mamba2": _mamba2(groups=1),
    "mamba2_groups": _mamba2(groups=2),
    "qwen3_next": Architecture(
        _config(
            "Qwen3NextForCausalLM", "qwen3_next", **GATED_DELTA, num_experts=EXPERTS, num_experts_per_tok=2,
            moe_intermediate_size=EXPERT, shared_expert_intermediate_size=EXPERT, norm_topk_prob=True,
            decoder_sparse_step=1, mlp_only_layers=[], router_aux_loss_coef=0.001,
        ),
        _gated_delta({"qkvz": 2 * KEYS + 2 * VALUES, "ba": 2 * LINEAR_V_HEADS}, _experts), one_plus=True,
    ),
    "qwen3_5": Architecture(
        _config(
            "Qwen3_5ForCausalLM", "qwen3_5_text", **GATED_DELTA,
            rope_parameters={
                "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5,
                "mrope_section": [4, 2, 2], "mrope_interleaved": True,
            },
        ),
        _gated_delta({"qkv": 2 * KEYS + VALUES, "z": VALUES, "b": LINEAR_V_HEADS, "a": LINEAR_V_HEADS}, _mlp),
        one_plus=True, engines=("sglang",),  # vLLM's needs torchvision, which has no build for the CPU
    ),
    "nemotron_h": Architecture(
        _config(
            "NemotronHForCausalLM", "nemotron_h", **{**UNTIED, "num_hidden_layers": len(NEMOTRON_LAYERS)},
            hybrid_override_pattern=NEMOTRON_LAYERS, mlp_hidden_act="relu2", mamba_hidden_act="silu",
            mamba_num_heads=MAMBA_HEADS, mamba_head_dim=MAMBA_HEAD, ssm_state_size=STATE, n_groups=NEMOTRON_GROUPS,
            mamba_n_groups=NEMOTRON_GROUPS, conv_kernel=CONV, expand=MAMBA // HIDDEN, chunk_size=64,
            layer_norm_epsilon=1e-5, rms_norm_eps=1e-5, use_bias=False, use_conv_bias=True, mlp_bias=False,
            mamba_proj_bias=False, residual_in_fp32=False, time_step_limit=[0.0, 1e9],
        ),
        _nemotron_h,
    ),
    "falcon_h1": Architecture(
        _config(
            "FalconH1ForCausalLM", "falcon_h1", **{**UNTIED, "num_hidden_layers": MAMBA_LAYERS}, rms_norm_eps=1e-5,
            mlp_bias=False, projectors_bias=False,
            mamba_d_ssm=MAMBA, mamba_n_heads=MAMBA_HEADS, mamba_d_head=MAMBA_HEAD, mamba_n_groups=FALCON_GROUPS,
            mamba_d_state=STATE, mamba_d_conv=CONV, mamba_expand=MAMBA // HIDDEN, mamba_chunk_size=64,
            mamba_conv_bias=True, mamba_proj_bias=False, mamba_rms_norm=True, mamba_norm_before_gate=False,
            attention_in_multiplier=1.0, attention_out_multiplier=1.0, embedding_multiplier=1.0, key_multiplier=1.0,
            lm_head_multiplier=1.0, mlp_multipliers=[1.0, 1.0], ssm_in_multiplier=1.0, ssm_out_multiplier=1.0,
            ssm_multipliers=[1.0] * 5,
        ),
        _falcon_h1,
    ),
}  # fmt: skip
