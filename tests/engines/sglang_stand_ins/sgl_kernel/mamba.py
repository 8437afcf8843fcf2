"""TESTS ONLY. In the place of sgl_kernel's CPU operators for Mamba and the gated delta rule: plain PyTorch, in fp32.

No norm is among them but the l2 norm of q and k inside the recurrence.
"""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

if not hasattr(torch.cpu, "device"):  # SGLang enters the device of a tensor before it launches a kernel
    torch.cpu.device = contextlib.nullcontext  # type: ignore[attr-defined]


def _activated(y: Tensor, activation: str | None) -> Tensor:
    return F.silu(y) if activation in ("silu", "swish") else y


def causal_conv1d_fn_cpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = "silu",
    conv_states: Tensor | None = None,
    has_initial_state: Tensor | None = None,
    cache_indices: Tensor | None = None,
    query_start_loc: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """x [channels, tokens] of several sequences behind each other, weight [channels, taps]; the states are updated."""
    assert conv_states is not None
    assert has_initial_state is not None
    assert cache_indices is not None
    assert query_start_loc is not None
    channels, taps = weight.shape
    result = torch.empty_like(x)
    ends = query_start_loc.tolist()
    for i, (start, end) in enumerate(itertools.pairwise(ends)):
        if start == end:
            continue
        slot = int(cache_indices[i])
        before = conv_states[slot].to(x.dtype) if has_initial_state[i] else x.new_zeros(channels, taps - 1)
        row = torch.cat([before, x[:, start:end]], dim=1)
        conv_states[slot] = row[:, 1 - taps :].to(conv_states.dtype)
        y = F.conv1d(row.float(), weight.float().unsqueeze(1), None if bias is None else bias.float(), groups=channels)
        result[:, start:end] = _activated(y, activation).to(x.dtype)
    return result


def causal_conv1d_update_cpu(
    x: Tensor,
    conv_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = "silu",
    conv_state_indices: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """x [sequences, channels], one token of each; the states are updated."""
    assert conv_state_indices is not None
    slots = conv_state_indices.long()
    rows = torch.cat([conv_states[slots].to(x.dtype), x.unsqueeze(2)], dim=2)
    conv_states[slots] = rows[:, :, 1:].to(conv_states.dtype)
    y = torch.einsum("sct,ct->sc", rows.float(), weight.float())
    return _activated(y if bias is None else y + bias.float(), activation).to(x.dtype)


def _unit(t: Tensor) -> Tensor:
    return t * torch.rsqrt(t.square().sum(-1, keepdim=True) + 1e-6)


def _delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, normalize: bool
) -> tuple[Tensor, Tensor]:
    """One sequence: q, k [tokens, heads, K], v [tokens, value heads, V], g, beta [tokens, value heads], state
    [value heads, V, K]. The state decays by exp(g), then learns what it did not predict of v, then answers q."""
    q, k, v, g, beta, state = (t.float() for t in (q, k, v, g, beta, state))
    if normalize:
        q, k = _unit(q), _unit(k)
    each = v.shape[1] // q.shape[1]
    q, k = (t.repeat_interleave(each, dim=1) for t in (q * q.shape[-1] ** -0.5, k))
    answers = []
    for t in range(v.shape[0]):
        state = state * g[t].exp()[:, None, None]
        surprise = (v[t] - (state * k[t].unsqueeze(1)).sum(-1)) * beta[t].unsqueeze(1)
        state = state + surprise.unsqueeze(2) * k[t].unsqueeze(1)
        answers.append((state * q[t].unsqueeze(1)).sum(-1))
    return torch.stack(answers), state


def _by_sequence(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, states: Tensor, slots: Tensor, ends: Tensor, unit: bool
) -> Tensor:
    """The delta rule of sequences that lie behind each other in dimension 1; the states are updated."""
    result = torch.empty_like(v)
    bounds = ends.tolist()
    for i, (start, end) in enumerate(itertools.pairwise(bounds)):
        slot = int(slots[i])
        if slot < 0 or start == end:
            continue
        parts = (t[0, start:end] for t in (q, k, v, g, beta))
        y, state = _delta_rule(*parts, states[slot], unit)
        result[0, start:end] = y.to(v.dtype)
        states[slot] = state.to(states.dtype)
    return result


def chunk_gated_delta_rule_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor,
    cu_seqlens: Tensor,
    head_first: bool,
    use_qk_l2norm_in_kernel: bool,
    initial_state_indices: Tensor,
) -> tuple[Tensor, None, None]:
    assert not head_first
    slots = initial_state_indices
    return _by_sequence(q, k, v, g, beta, initial_state, slots, cu_seqlens, use_qk_l2norm_in_kernel), None, None


def fused_gdn_gating_cpu(A_log: Tensor, a: Tensor, b: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    decay = -A_log.float().exp() * F.softplus(a.float() + dt_bias.float())
    return decay.unsqueeze(0), b.float().sigmoid().unsqueeze(0)


def fused_sigmoid_gating_delta_rule_update_cpu(
    A_log: Tensor,
    dt_bias: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    initial_state_source: Tensor,
    initial_state_indices: Tensor,
    cu_seqlens: Tensor,
    use_qk_l2norm_in_kernel: bool,
    softplus_beta: float = 1.0,
    softplus_threshold: float = 20.0,
) -> Tensor:
    g, beta = fused_gdn_gating_cpu(A_log, a, b, dt_bias)
    slots = initial_state_indices
    return _by_sequence(q, k, v, g, beta, initial_state_source, slots, cu_seqlens, use_qk_l2norm_in_kernel)


_library = torch.library.Library("sgl_kernel", "FRAGMENT")
_library.define("fused_gdn_gating_cpu(Tensor A_log, Tensor a, Tensor b, Tensor dt_bias) -> (Tensor, Tensor)")
_library.define(
    "fused_sigmoid_gating_delta_rule_update_cpu(Tensor A_log, Tensor dt_bias, Tensor q, Tensor k, Tensor v, Tensor a, "
    "Tensor b, Tensor(a!) initial_state_source, Tensor initial_state_indices, Tensor cu_seqlens, "
    "bool use_qk_l2norm_in_kernel, float softplus_beta=1.0, float softplus_threshold=20.0) -> Tensor"
)
_library.impl("fused_gdn_gating_cpu", fused_gdn_gating_cpu, "CPU")
_library.impl("fused_sigmoid_gating_delta_rule_update_cpu", fused_sigmoid_gating_delta_rule_update_cpu, "CPU")
