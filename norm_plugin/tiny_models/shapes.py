"""The shape of each tensor of the tiny models, by the names that published checkpoints have."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

VOCAB, LAYERS, POSITIONS = 320, 3, 512
MAMBA_LAYERS, CONV = 2, 4
QWEN_LAYERS = ("linear_attention", "linear_attention", "linear_attention", "full_attention")
EXPERTS = 4
NEMOTRON_LAYERS, NEMOTRON_GROUPS = "M-*-M", 2
FALCON_GROUPS = 2

Shapes = Iterator[tuple[str, tuple[int, ...]]]


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

#: For a GPU, whose products of narrow matrices have the same bits in batches of every size, which those of models that
#: are served have not: the noise of an engine shows from some width on.
WIDE = Sizes(
    hidden=1024, inner=4096, heads=8, kv_heads=2, head=128, mamba_heads=32, mamba_head=64, state=64,
    linear_head=128, linear_k_heads=4, linear_v_heads=8, expert=512,
)  # fmt: skip


def _linear(name: str, out: int, into: int) -> Shapes:
    yield f"{name}.weight", (out, into)


def _norm(s: Sizes, *names: str, width: int | None = None) -> Shapes:
    for name in names:
        yield f"{name}.weight", (width or s.hidden,)


def _attention(s: Sizes, at: str, q: int | None = None) -> Shapes:
    yield from _linear(f"{at}.q_proj", q or s.heads * s.head, s.hidden)
    yield from _linear(f"{at}.k_proj", s.kv_heads * s.head, s.hidden)
    yield from _linear(f"{at}.v_proj", s.kv_heads * s.head, s.hidden)
    yield from _linear(f"{at}.o_proj", s.hidden, s.heads * s.head)


def mlp(s: Sizes, at: str, inner: int | None = None) -> Shapes:
    yield from _linear(f"{at}.gate_proj", inner or s.inner, s.hidden)
    yield from _linear(f"{at}.up_proj", inner or s.inner, s.hidden)
    yield from _linear(f"{at}.down_proj", s.hidden, inner or s.inner)


def _mamba(s: Sizes, at: str, groups: int) -> Shapes:
    channels = s.mamba + 2 * groups * s.state
    yield from _linear(f"{at}.in_proj", s.mamba + channels + s.mamba_heads, s.hidden)
    yield f"{at}.conv1d.weight", (channels, 1, CONV)
    yield f"{at}.conv1d.bias", (channels,)
    for name in ("dt_bias", "A_log", "D"):
        yield f"{at}.{name}", (s.mamba_heads,)
    yield from _norm(s, f"{at}.norm", width=s.mamba)
    yield from _linear(f"{at}.out_proj", s.hidden, s.mamba)


def transformer(s: Sizes, norms: tuple[str, ...], qk_norm: bool, tied: bool) -> Callable[[], Shapes]:
    """Llama and its relatives: they differ in the norms of a layer."""

    def shapes() -> Shapes:
        yield "model.embed_tokens.weight", (VOCAB, s.hidden)
        for i in range(LAYERS):
            at = f"model.layers.{i}"
            yield from _norm(s, *(f"{at}.{norm}" for norm in norms))
            yield from _attention(s, f"{at}.self_attn")
            if qk_norm:
                yield from _norm(s, f"{at}.self_attn.q_norm", f"{at}.self_attn.k_norm", width=s.head)
            yield from mlp(s, f"{at}.mlp", s.inner)
        yield from _norm(s, "model.norm")
        if not tied:
            yield "lm_head.weight", (VOCAB, s.hidden)

    return shapes


TWO = ("input_layernorm", "post_attention_layernorm")
FOUR = (*TWO, "pre_feedforward_layernorm", "post_feedforward_layernorm")


def gpt2(s: Sizes) -> Shapes:
    yield "transformer.wte.weight", (VOCAB, s.hidden)
    yield "transformer.wpe.weight", (POSITIONS, s.hidden)
    layers = [f"transformer.h.{i}" for i in range(LAYERS)]
    for at in layers:
        yield f"{at}.attn.c_attn.weight", (s.hidden, 3 * s.hidden)
        yield f"{at}.attn.c_attn.bias", (3 * s.hidden,)
        yield f"{at}.attn.c_proj.weight", (s.hidden, s.hidden)
        yield f"{at}.attn.c_proj.bias", (s.hidden,)
        yield f"{at}.mlp.c_fc.weight", (s.hidden, s.inner)
        yield f"{at}.mlp.c_fc.bias", (s.inner,)
        yield f"{at}.mlp.c_proj.weight", (s.inner, s.hidden)
        yield f"{at}.mlp.c_proj.bias", (s.hidden,)
    for norm in [*(f"{at}.{norm}" for at in layers for norm in ("ln_1", "ln_2")), "transformer.ln_f"]:
        yield from _norm(s, norm)
        yield f"{norm}.bias", (s.hidden,)


def mamba2(s: Sizes, groups: int) -> Shapes:
    yield "backbone.embeddings.weight", (VOCAB, s.hidden)
    for i in range(MAMBA_LAYERS):
        yield from _norm(s, f"backbone.layers.{i}.norm")
        yield from _mamba(s, f"backbone.layers.{i}.mixer", groups)
    yield from _norm(s, "backbone.norm_f")
    yield "lm_head.weight", (VOCAB, s.hidden)


def experts(s: Sizes, at: str) -> Shapes:
    yield from _linear(f"{at}.gate", EXPERTS, s.hidden)
    for expert in range(EXPERTS):
        yield from mlp(s, f"{at}.experts.{expert}", s.expert)
    yield from mlp(s, f"{at}.shared_expert", s.expert)
    yield from _linear(f"{at}.shared_expert_gate", 1, s.hidden)


def gated_delta(s: Sizes, into: dict[str, int], mlp: Callable[[Sizes, str], Shapes]) -> Callable[[], Shapes]:
    """Qwen3-Next and Qwen3.5: they differ in how the projections into linear attention are put together."""

    def shapes() -> Shapes:
        yield "model.embed_tokens.weight", (VOCAB, s.hidden)
        for i, kind in enumerate(QWEN_LAYERS):
            at = f"model.layers.{i}"
            yield from _norm(s, *(f"{at}.{norm}" for norm in TWO))
            if kind == "full_attention":
                yield from _attention(s, f"{at}.self_attn", q=2 * s.heads * s.head)  # the queries and their gate
                yield from _norm(s, f"{at}.self_attn.q_norm", f"{at}.self_attn.k_norm", width=s.head)
            else:
                for name, width in into.items():
                    yield from _linear(f"{at}.linear_attn.in_proj_{name}", width, s.hidden)
                yield f"{at}.linear_attn.conv1d.weight", (2 * s.keys + s.values, 1, CONV)
                yield f"{at}.linear_attn.dt_bias", (s.linear_v_heads,)
                yield f"{at}.linear_attn.A_log", (s.linear_v_heads,)
                yield from _norm(s, f"{at}.linear_attn.norm", width=s.linear_head)
                yield from _linear(f"{at}.linear_attn.out_proj", s.hidden, s.values)
            yield from mlp(s, f"{at}.mlp")
        yield from _norm(s, "model.norm")
        yield "lm_head.weight", (VOCAB, s.hidden)

    return shapes


def nemotron_h(s: Sizes) -> Shapes:
    yield "backbone.embeddings.weight", (VOCAB, s.hidden)
    for i, kind in enumerate(NEMOTRON_LAYERS):
        at = f"backbone.layers.{i}"
        yield from _norm(s, f"{at}.norm")
        if kind == "M":
            yield from _mamba(s, f"{at}.mixer", NEMOTRON_GROUPS)
        elif kind == "*":
            yield from _attention(s, f"{at}.mixer")
        else:
            yield from _linear(f"{at}.mixer.up_proj", s.inner, s.hidden)
            yield from _linear(f"{at}.mixer.down_proj", s.hidden, s.inner)
    yield from _norm(s, "backbone.norm_f")
    yield "lm_head.weight", (VOCAB, s.hidden)


def falcon_h1(s: Sizes) -> Shapes:
    yield "model.embed_tokens.weight", (VOCAB, s.hidden)
    for i in range(MAMBA_LAYERS):
        at = f"model.layers.{i}"
        yield from _norm(s, f"{at}.input_layernorm", f"{at}.pre_ff_layernorm")
        yield from _mamba(s, f"{at}.mamba", FALCON_GROUPS)
        yield from _attention(s, f"{at}.self_attn")
        yield from mlp(s, f"{at}.feed_forward", s.inner)
    yield from _norm(s, "model.final_layernorm")
    yield "lm_head.weight", (VOCAB, s.hidden)
