"""The shape of each tensor of the tiny models, by the names that published checkpoints have."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

VOCAB, LAYERS, POSITIONS = 320, 3, 512
MAMBA_LAYERS, CONV = 2, 4
QWEN_LAYERS = ("linear_attention", "linear_attention", "linear_attention", "full_attention")
EXPERTS = 4
NEMOTRON_LAYERS, NEMOTRON_GROUPS = "M-*-M", 2
FALCON_GROUPS = 2

#: The shape of each tensor by its name, in the order of the file.
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Sizes:
    """The widths of all models."""

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head: int
    mamba_heads: int
    mamba_head: int
    state: int
    linear_head: int
    linear_k_heads: int
    linear_v_heads: int
    expert: int

    @property
    def mamba(self) -> int:
        return self.mamba_heads * self.mamba_head

    @property
    def keys(self) -> int:
        return self.linear_k_heads * self.linear_head

    @property
    def values(self) -> int:
        return self.linear_v_heads * self.linear_head


#: The smallest that both engines run on a CPU: vLLM's attention there wants heads of 32 or more.
TINY = Sizes(
    hidden=128, inner=256, heads=4, kv_heads=2, head=32, mamba_heads=8, mamba_head=32, state=16,
    linear_head=64, linear_k_heads=2, linear_v_heads=4, expert=64,
)  # fmt: skip

#: For a GPU: there, products of narrow matrices have the same bits in batches of every size, which those of real models
#: have not. So the noise of an engine shows only from some width on.
WIDE = Sizes(
    hidden=1024, inner=4096, heads=8, kv_heads=2, head=128, mamba_heads=32, mamba_head=64, state=64,
    linear_head=128, linear_k_heads=4, linear_v_heads=8, expert=512,
)  # fmt: skip


TWO = ("input_layernorm", "post_attention_layernorm")
FOUR = (*TWO, "pre_feedforward_layernorm", "post_feedforward_layernorm")


# --- parts of a layer ---------------------------------------------------------------------------------------------


def _weights(at: str, **shapes: tuple[int, ...]) -> Shapes:
    return {f"{at}.{name}.weight": shape for name, shape in shapes.items()}


def _norms(at: str, width: int, *names: str) -> Shapes:
    return _weights(at, **dict.fromkeys(names, (width,)))


def _attention(s: Sizes, at: str, queries: int = 1) -> Shapes:
    """`queries`: 2 where each query has a gate beside it."""
    q, kv = (s.heads * s.head, s.hidden), (s.kv_heads * s.head, s.hidden)
    return _weights(at, q_proj=(queries * q[0], s.hidden), k_proj=kv, v_proj=kv, o_proj=q[::-1])


def _qk_norms(s: Sizes, at: str) -> Shapes:
    return _norms(at, s.head, "q_norm", "k_norm")


def mlp(s: Sizes, at: str, inner: int | None = None) -> Shapes:
    up = (inner or s.inner, s.hidden)
    return _weights(at, gate_proj=up, up_proj=up, down_proj=up[::-1])


def experts(s: Sizes, at: str) -> Shapes:
    found = _weights(at, gate=(EXPERTS, s.hidden))
    for name in (*(f"experts.{expert}" for expert in range(EXPERTS)), "shared_expert"):
        found |= mlp(s, f"{at}.{name}", s.expert)
    return found | _weights(at, shared_expert_gate=(1, s.hidden))


def _mamba(s: Sizes, at: str, groups: int) -> Shapes:
    channels = s.mamba + 2 * groups * s.state
    return {
        **_weights(at, in_proj=(s.mamba + channels + s.mamba_heads, s.hidden), conv1d=(channels, 1, CONV)),
        f"{at}.conv1d.bias": (channels,),
        **{f"{at}.{name}": (s.mamba_heads,) for name in ("dt_bias", "A_log", "D")},
        **_weights(at, norm=(s.mamba,), out_proj=(s.hidden, s.mamba)),
    }


def _linear_attention(s: Sizes, at: str, into: dict[str, int]) -> Shapes:
    return {
        **_weights(at, **{f"in_proj_{name}": (width, s.hidden) for name, width in into.items()}),
        **_weights(at, conv1d=(2 * s.keys + s.values, 1, CONV)),
        **{f"{at}.{name}": (s.linear_v_heads,) for name in ("dt_bias", "A_log")},
        **_weights(at, norm=(s.linear_head,), out_proj=(s.hidden, s.values)),
    }


# --- models -------------------------------------------------------------------------------------------------------


def _model(
    s: Sizes, embedding: str, layer: Callable[[str, str], Shapes], kinds: Iterable[str], norm: str, tied: bool = False
) -> Shapes:
    """`layer` gives the shapes of a layer from its path and its kind."""
    found: Shapes = {f"{embedding}.weight": (VOCAB, s.hidden)}
    for i, kind in enumerate(kinds):
        found |= layer(f"{embedding.partition('.')[0]}.layers.{i}", kind)
    found[f"{norm}.weight"] = (s.hidden,)
    if not tied:
        found["lm_head.weight"] = (VOCAB, s.hidden)
    return found


def transformer(s: Sizes, norms: tuple[str, ...], qk_norm: bool, tied: bool) -> Shapes:
    """Llama and its relatives: they differ in the norms of a layer."""

    def layer(at: str, _: str) -> Shapes:
        of_heads = _qk_norms(s, f"{at}.self_attn") if qk_norm else {}
        return _norms(at, s.hidden, *norms) | _attention(s, f"{at}.self_attn") | of_heads | mlp(s, f"{at}.mlp")

    return _model(s, "model.embed_tokens", layer, " " * LAYERS, "model.norm", tied)


def gpt2(s: Sizes) -> Shapes:
    found = _weights("transformer", wte=(VOCAB, s.hidden), wpe=(POSITIONS, s.hidden))
    layers = [f"transformer.h.{i}" for i in range(LAYERS)]
    linear = {
        "attn.c_attn": (s.hidden, 3 * s.hidden), "attn.c_proj": (s.hidden, s.hidden),
        "mlp.c_fc": (s.hidden, s.inner), "mlp.c_proj": (s.inner, s.hidden),
    }  # fmt: skip
    for at in layers:
        for name, (into, out) in linear.items():
            found |= {f"{at}.{name}.weight": (into, out), f"{at}.{name}.bias": (out,)}
    for norm in [*(f"{at}.{norm}" for at in layers for norm in ("ln_1", "ln_2")), "transformer.ln_f"]:
        found |= {f"{norm}.weight": (s.hidden,), f"{norm}.bias": (s.hidden,)}
    return found


def mamba2(s: Sizes, groups: int) -> Shapes:
    def layer(at: str, _: str) -> Shapes:
        return _norms(at, s.hidden, "norm") | _mamba(s, f"{at}.mixer", groups)

    return _model(s, "backbone.embeddings", layer, " " * MAMBA_LAYERS, "backbone.norm_f")


def gated_delta(s: Sizes, into: dict[str, int], feed_forward: Callable[[Sizes, str], Shapes]) -> Shapes:
    """Qwen3-Next and Qwen3.5: they differ in how the projections `into` linear attention are put together."""

    def layer(at: str, kind: str) -> Shapes:
        if kind == "full_attention":
            attention = _attention(s, f"{at}.self_attn", queries=2) | _qk_norms(s, f"{at}.self_attn")
        else:
            attention = _linear_attention(s, f"{at}.linear_attn", into)
        return _norms(at, s.hidden, *TWO) | attention | feed_forward(s, f"{at}.mlp")

    return _model(s, "model.embed_tokens", layer, QWEN_LAYERS, "model.norm")


def nemotron_h(s: Sizes) -> Shapes:
    def layer(at: str, kind: str) -> Shapes:
        mixer = {
            "M": _mamba(s, f"{at}.mixer", NEMOTRON_GROUPS),
            "*": _attention(s, f"{at}.mixer"),
            "-": _weights(f"{at}.mixer", up_proj=(s.inner, s.hidden), down_proj=(s.hidden, s.inner)),
        }
        return _norms(at, s.hidden, "norm") | mixer[kind]

    return _model(s, "backbone.embeddings", layer, NEMOTRON_LAYERS, "backbone.norm_f")


def falcon_h1(s: Sizes) -> Shapes:
    def layer(at: str, _: str) -> Shapes:
        norms = _norms(at, s.hidden, "input_layernorm", "pre_ff_layernorm")
        mixers = _mamba(s, f"{at}.mamba", FALCON_GROUPS) | _attention(s, f"{at}.self_attn")
        return norms | mixers | mlp(s, f"{at}.feed_forward")

    return _model(s, "model.embed_tokens", layer, " " * MAMBA_LAYERS, "model.final_layernorm")
