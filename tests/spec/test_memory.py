"""The q of a fused qkv projection, a 3-D slice [T, heads, D], is normalized without a copy of it.

Eager PyTorch computes in fp32, so it holds fp32 values of the rows, which are larger than a copy would be. These tests
do not forbid that. They assert that no op copies the input as it is, and that only the output is left when the call
returns. Compiled code has no such values: a call allocates its output, and the few fp32 numbers that Inductor keeps for
each row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import norm_plugin
from norm_plugin import dispatch, settings
from norm_plugin.accuracy import inputs
from norm_plugin.native import gated, layer, rms

TOKENS, HEADS, OTHERS, WIDTH = 16, 8, 4, 128
EPS = 1e-6
FP32_BYTES = 4

#: The ops that may read the input: views, the step to fp32, and arithmetic if the input is fp32.
MAY_READ = {"slice", "view", "unsqueeze", "alias", "expand", "empty_like", "_to_copy", "pow", "mean", "mul", "sub"}

CALLS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], int]] = {
    # name: (native, public, numbers that are kept for each row)
    "rmsnorm": (lambda x, w: rms.rmsnorm(x, w, EPS), lambda x, w: norm_plugin.rmsnorm(x, w, EPS), 1),
    "l2norm": (lambda x, w: rms.l2norm(x, EPS), lambda x, w: norm_plugin.l2norm(x, EPS), 1),
    "layernorm": (lambda x, w: layer.layernorm(x, w, w, EPS), lambda x, w: norm_plugin.layernorm(x, w, w, EPS), 3),
    "gated": (
        lambda x, w: gated.gated_norm(x, w, None, is_rms_norm=True),
        lambda x, w: norm_plugin.rmsnorm_fn(x, w, None),
        1,
    ),
}


def query(dtype: torch.dtype) -> Tensor:
    """The q of a fused qkv."""
    qkv = inputs.make("normal", (TOKENS, (HEADS + OTHERS) * WIDTH), dtype)
    q = qkv[:, : HEADS * WIDTH].unflatten(1, (HEADS, WIDTH))
    assert not q.is_contiguous()
    return q


class ReadersOf(TorchDispatchMode):
    """Collects the ops that read the memory of a tensor."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.memory = tensor.untyped_storage().data_ptr()
        self.readers: list[tuple[str, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(isinstance(a, Tensor) and a.untyped_storage().data_ptr() == self.memory for a in args):
            self.readers.append((func.overloadpacket.__name__, (kwargs or {}).get("dtype")))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_no_op_copies_the_input(name: str, dtype: torch.dtype) -> None:
    x, weight = query(dtype), inputs.weights(WIDTH, dtype)
    with ReadersOf(x) as mode:
        CALLS[name][0](x, weight)
    assert mode.readers
    for reader, to in mode.readers:
        assert reader in MAY_READ, reader
        assert reader != "_to_copy" or (to == torch.float32 and dtype != torch.float32), "copied as it is"


def test_the_reader_sees_a_copy() -> None:
    """So the check above can fail."""
    x = query(torch.bfloat16)
    with ReadersOf(x) as mode:
        x.contiguous()
        x.reshape(-1, WIDTH)
    assert {reader for reader, _ in mode.readers} - MAY_READ == {"clone"}


def allocations(call: Callable[[], Tensor]) -> list[int]:
    """Bytes allocated (positive) and freed (negative) during one call, its output kept."""
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        output = call()
    events = profiled.profiler.kineto_results.events()
    found = [event.nbytes() for event in events if event.name() == "[memory]"]
    assert output.numel()
    return found


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_eager_leaves_its_output_and_nothing_else(name: str, dtype: torch.dtype) -> None:
    x, weight = query(dtype), inputs.weights(WIDTH, dtype)
    assert sum(allocations(lambda: CALLS[name][1](x, weight))) == x.numel() * x.element_size()


@pytest.mark.parametrize("name", CALLS)
def test_compiled_allocates_its_output_and_numbers_of_rows(name: str) -> None:
    x, weight = query(torch.bfloat16), inputs.weights(WIDTH, torch.bfloat16)
    _, public, numbers = CALLS[name]
    with settings.override(backend="native", compile=True, strict=True):
        found = allocations(lambda: public(x, weight))
        assert {route.backend for route in dispatch.routes()} == {"native, compiled"}
    output, per_row = x.numel() * x.element_size(), TOKENS * HEADS * FP32_BYTES
    assert sum(found) == output
    assert sum(size for size in found if size > 0) <= output + numbers * per_row
