"""Refused calls, as a user would write them. test_refused.py makes them, and docs/errors.md shows them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

import norm_plugin
from tests.spec.backend import Backend

SHAPE = (3, 48)


class Refused(NamedTuple):
    """A call, its error with the first line of the message, and a right call of the same function."""

    call: str
    error: type[Exception]
    message: str
    right: str


def with_negative_bit(t: Tensor) -> Tensor:
    """-t, as the imaginary part of a conjugate: the memory of t, and a bit that says minus."""
    negative = torch.complex(torch.zeros_like(t), t).conj().imag
    assert negative.is_neg()
    return negative


def names(backend: Backend) -> dict[str, Any]:
    """The names in the calls: the public functions, and new tensors."""

    def made(shape: tuple[int, ...] = SHAPE, seed: int = 1) -> Tensor:
        return backend.make("normal", shape, torch.float32, seed)

    buffer, base = made((4, 48)), made((6, 48)).requires_grad_() * 1
    with torch.no_grad():
        view_of_no_grad = base[:3]
    with torch.inference_mode():
        of_inference = made()
    return {name: getattr(norm_plugin, name) for name in norm_plugin.__all__} | {
        "torch": torch,
        "x": buffer[:3],
        "next_rows": buffer[1:],
        "residual": made(seed=2),
        "weight": made(seed=3)[0],
        "learned_weight": made(seed=3)[0].requires_grad_(),
        "leaf": made(seed=4).requires_grad_(),
        "learned": made(seed=4).requires_grad_() * 1,
        "chunk": base.chunk(2)[0],
        "view_of_no_grad": view_of_no_grad,
        "of_inference": of_inference,
        "negative": with_negative_bit(made(seed=5)),
    }


NORM, ADD = "rmsnorm(x, weight)", "fused_add_rmsnorm(x, residual, weight)"
LEARNED_ADD = "fused_add_rmsnorm(x, residual, learned_weight)"
GEMMA_ADD = "gemma_fused_add_rmsnorm(x, residual, weight)"
QUANT, BLOCKS = "rmsnorm_dynamic_quant(x, None)", "rmsnorm_block_quant(x, None, group_size=16)"
LAYER = "layernorm(x, None, None)"
OUT = "rmsnorm(x, None, out=residual)"

NONE = "{} is None, and it has no meaning then; give it."
SAME = "input and residual are the same memory, and both are written; clone one of them."
APART = "{} overlap in memory, and {} written; clone one of them."
LEAF = "{} is a leaf that requires a gradient, and it is written in place; pass a copy of it."
VIEW = (
    "{} is a view that torch does not let be written where gradients are recorded (one of several that a split or "
    "chunk returned, or one made under no_grad); pass a clone of it."
)
INFERENCE = (
    "{} is an inference tensor, and it is written in place, which torch allows under torch.inference_mode() alone; "
    "pass a clone of it."
)
FORMULA = (
    "torch.ops.norm_plugin.rmsnorm has no formula for forward-mode differentiation; call the function of norm_plugin "
    "instead, which has one."
)
#: torch's own words, of which the first line is the same in every version.
SCHEMA = "norm_plugin::{}() Expected a value of type '{}' for argument '{}' but instead found type '{}'."

REFUSED = (
    Refused("rmsnorm(None, None)", TypeError, NONE.format("input"), NORM),
    Refused("fused_add_rmsnorm(x, None, weight)", TypeError, NONE.format("residual"), ADD),
    Refused("rmsnorm(x, weight, numerics=None)", TypeError, NONE.format("numerics"), NORM),
    Refused("layernorm(x, None, None, eps=None)", TypeError, NONE.format("eps"), LAYER),
    Refused("rmsnorm_dynamic_quant(x, None, quant_dtype=None)", TypeError, NONE.format("quant_dtype"), QUANT),
    Refused("rmsnorm_block_quant(x, None, group_size=None)", TypeError, NONE.format("group_size"), BLOCKS),
    Refused("rmsnorm([1.0, 2.0], None)", RuntimeError, SCHEMA.format("rmsnorm", "Tensor", "input", "list"), NORM),
    Refused(
        "layernorm(x, 1.0, None)", RuntimeError,
        SCHEMA.format("layernorm", "Optional[Tensor]", "weight", "float"), LAYER,
    ),
    Refused("fused_add_rmsnorm(x, x, weight)", ValueError, SAME, ADD),
    Refused("fused_add_rmsnorm(x, x, learned_weight)", ValueError, SAME, LEARNED_ADD),
    Refused("gemma_fused_add_rmsnorm(x, x, weight)", ValueError, SAME, GEMMA_ADD),
    Refused("gemma_fused_add_rmsnorm(x, x, learned_weight)", ValueError, SAME, GEMMA_ADD),
    Refused(
        "fused_add_rmsnorm(x, next_rows, weight)", ValueError, APART.format("input and residual", "both are"), ADD,
    ),
    Refused(
        "fused_add_rmsnorm(x, residual, x[2])", ValueError, APART.format("input and weight", "input is"), ADD,
    ),
    Refused("rmsnorm(x, None, out=next_rows)", ValueError, APART.format("out and input", "out is"), OUT),
    Refused("fused_add_rmsnorm(leaf, residual, weight)", RuntimeError, LEAF.format("input"), ADD),
    Refused("fused_add_rmsnorm(x, leaf, weight)", RuntimeError, LEAF.format("residual"), ADD),
    Refused("fused_add_rmsnorm(chunk, residual, weight)", RuntimeError, VIEW.format("input"), ADD),
    Refused("fused_add_rmsnorm(x, chunk, weight)", RuntimeError, VIEW.format("residual"), ADD),
    Refused("fused_add_rmsnorm(view_of_no_grad, residual, weight)", RuntimeError, VIEW.format("input"), ADD),
    Refused("fused_add_rmsnorm(x, view_of_no_grad, weight)", RuntimeError, VIEW.format("residual"), ADD),
    Refused("fused_add_rmsnorm(of_inference, residual, weight)", RuntimeError, INFERENCE.format("input"), ADD),
    Refused("fused_add_rmsnorm(x, of_inference, weight)", RuntimeError, INFERENCE.format("residual"), ADD),
    Refused(
        "rmsnorm_dynamic_quant(x, None, learned)", RuntimeError,
        "residual requires a gradient, and rmsnorm_dynamic_quant, which writes it, has none; call it under "
        "torch.no_grad().",
        QUANT,
    ),
    Refused(
        "fused_add_rmsnorm(x, negative, weight)", ValueError,
        "residual has the negative bit, and it is written in place; pass residual.resolve_neg().", ADD,
    ),
    Refused(
        "torch.func.jvp(lambda x: torch.ops.norm_plugin.rmsnorm(x, None), (x,), (residual,))", NotImplementedError,
        FORMULA, "torch.ops.norm_plugin.rmsnorm(x, None)",
    ),
)  # fmt: skip
