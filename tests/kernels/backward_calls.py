"""Calls of the backward ops on their kernels, which the tests of their values and of their bits share."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor

from norm_plugin import dispatch
from norm_plugin.kernels import backward_configs as configs
from norm_plugin.op import Op
from tests.kernels.twins import TRITON
from tests.spec import samples, test_gradients

GATED = [
    {"norm_before_gate": before, "is_rms_norm": rms, "group_size": group, "activation": activation}
    for before, rms, group, activation in [
        (True, True, None, "silu"),
        (True, False, 16, "sigmoid"),
        (False, True, 16, "silu"),
        (False, False, None, "sigmoid"),
        (False, False, 16, "silu"),
        (True, True, 16, "silu"),
    ]
]
KINDS: list[tuple[str, samples.Arguments]] = [
    ("rmsnorm", {}),
    ("rmsnorm", {"gemma": True}),
    ("rmsnorm", {"weight": None}),
    ("add_rmsnorm", {}),
    ("add_rmsnorm", {"gemma": True}),
    ("l2norm", {}),
    ("layernorm", {}),
    ("layernorm", {"bias": None}),
    ("layernorm", {"weight": None}),
    *(("gated_norm", how) for how in GATED),
    ("gated_norm", {"z": None, "is_rms_norm": True}),
    ("gated_norm", {"bias": None, "is_rms_norm": True}),
]
LABELS = [samples.label(*kind) for kind in KINDS]
every_kind = pytest.mark.parametrize(("name", "variant"), KINDS, ids=LABELS)


def backward_calls(name: str) -> int:
    return dispatch.calls("rmsnorm_backward" if name == "add_rmsnorm" else f"{name}_backward", "triton")


def incoming(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    return [TRITON.make("normal", shape, dtype, seed) for seed in (7, 8)][: 2 if name == "add_rmsnorm" else 1]


def gradients(name: str, a: samples.Arguments, *grads: Tensor) -> dict[str, Tensor]:
    """Through autograd, on the kernels."""
    before = backward_calls(name)
    found = test_gradients.gradients(name, a, *grads)
    assert backward_calls(name) == before + 1
    return found


def forced(entry: tuple[int, ...] | None) -> AbstractContextManager[None]:
    return nullcontext() if entry is None else configs.forced(*entry)


#: One of each: a mean or none, a gate before or after or none, groups or none, a sum's gradient.
FEW = [KINDS[LABELS.index(label)] for label in LABELS if label in ("rmsnorm", "add_rmsnorm-gemma=True", "layernorm")]
FEW += [("gated_norm", GATED[1]), ("gated_norm", GATED[2])]
few_kinds = pytest.mark.parametrize(("name", "variant"), FEW, ids=[samples.label(*kind) for kind in FEW])


def arguments(op: Op, shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> samples.Arguments:
    """A call of a backward op itself, all gradients asked for."""
    a = TRITON.arguments(op, shape, dtype)
    return a | {"grad": TRITON.make("normal", shape, dtype, 7)}


def listed(op: Op, a: samples.Arguments) -> list[Tensor]:
    found = dispatch.call(op, *a.values())
    return found if isinstance(found, list) else [found]
