"""Every sort of launch configuration gives right results, and the choice that depends on the batch changes no bit.

The grid: one op of each kernel and of each quantisation x warps and rows of a program x a width that fits one chunk,
and one that takes several chunks or leaves lanes idle. The tables of the GPUs have such entries, and the grid has all
sorts of them: one row or several, one chunk or many, weights read with the row (few elements a thread) or later.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from norm_plugin import dispatch
from norm_plugin.kernels import configs
from norm_plugin.op import Op
from norm_plugin.ops import OPS
from tests.kernels import twins
from tests.kernels.device import DEVICE
from tests.kernels.twins import TRITON
from tests.spec import judge, samples

ENTRIES = [(1, 1), (4, 1), (32, 1), (1, 2), (4, 4), (2, 8), (8, 16), (4, 32), (32, 16)]
WIDTHS = [80, 1280]

#: (warps, rows), width: so that the elements of a thread may fit its registers.
POINTS = [(entry, width) for entry in ENTRIES for width in WIDTHS if entry[1] * width <= entry[0] * 32 * 64]
CALLS: list[tuple[str, samples.Arguments]] = [
    ("rmsnorm", {}),
    ("fused_add_rmsnorm", {"numerics": "vllm_c"}),
    ("layernorm", {}),
    ("gated_norm", {"is_rms_norm": True}),
    ("gated_norm", {"norm_before_gate": False}),
    ("split_sums", {}),
    ("split_rmsnorm", {"numerics": "hf"}),
    ("rmsnorm_dynamic_quant", {}),
    ("rmsnorm_block_quant", {"group_size": 16}),
]
LABELS = [samples.label(*call) for call in CALLS]


def weights_with_rows(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the weights are read with the row, of every launch from now on that goes through Triton."""
    from norm_plugin.kernels.launch import Launch

    seen: list[bool] = []
    through_jit = Launch.through_jit

    def spied(self: Any, *args: Any) -> None:
        seen.append(bool(self.constants["tile"].with_row))
        through_jit(self, *args)

    monkeypatch.setattr(Launch, "through_jit", spied)
    return seen


def rows_of(op: Op, a: samples.Arguments, count: int) -> samples.Arguments:
    """The same call on its first rows."""
    return a | {name: a[name][:count] for name in samples.alike(op) if a[name] is not None}


@pytest.mark.parametrize(("entry", "width"), POINTS, ids=str)
@pytest.mark.parametrize(("name", "variant"), CALLS, ids=LABELS)
def test_right_in_every_configuration(
    name: str, variant: samples.Arguments, entry: tuple[int, int], width: int
) -> None:
    """The batch has one row more than a program takes, so the last program has a single row."""
    op = OPS[name]
    a = TRITON.arguments(op, (entry[1] + 1, width), torch.bfloat16, **variant)
    with configs.forced(*entry, 1, 0):
        outputs = TRITON.outputs(op, a)
    judge.check(op, a, outputs)
    twins.seldom_apart(op, a, outputs, twins.native(op, a))


@pytest.mark.parametrize("vector", [8, 4, 2])
@pytest.mark.parametrize(("name", "variant"), CALLS, ids=LABELS)
def test_right_in_narrower_chunks(name: str, variant: samples.Arguments, vector: int) -> None:
    """A thread loads fewer bytes, so there are more chunks, and the last may have fewer columns."""
    op = OPS[name]
    a = TRITON.arguments(op, (3, 1200), torch.bfloat16, **variant)
    with configs.forced(4, 1, 1, 0, vector):
        assert configs.config("rms", 1200, 2, "").block == 4 * 32 * vector // 2
        outputs = TRITON.outputs(op, a)
    judge.check(op, a, outputs)
    twins.seldom_apart(op, a, outputs, twins.native(op, a))


@pytest.mark.parametrize("entry", [(4, 1), (4, 4)], ids=str)
@pytest.mark.parametrize(("name", "variant"), CALLS, ids=LABELS)
def test_lean_launches_of_large_batches_change_no_bit(
    name: str, variant: samples.Arguments, entry: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From `lean` programs per multiprocessor on, weights are read late; with one row less, with the rows."""
    from norm_plugin.kernels.launch import processors

    op, lean = OPS[name], 2
    switch = processors(DEVICE) * lean * entry[1]
    a = TRITON.arguments(op, (switch, 128), torch.bfloat16, **variant)
    seen = weights_with_rows(monkeypatch)
    with configs.forced(*entry, 1, lean):
        many, few = TRITON.outputs(op, a), TRITON.outputs(op, rows_of(op, a, switch - 1))
        assert set(seen) == {True, False}, "there was no switch"
    assert all(twins.same_bits(one[: switch - 1], other) for one, other in zip(many, few, strict=True))
    judge.check(op, a, many)


@pytest.mark.parametrize(("name", "variant"), CALLS, ids=LABELS)
def test_releasing_the_next_kernel_early_or_late_changes_no_bit(name: str, variant: samples.Arguments) -> None:
    op = OPS[name]
    a = TRITON.arguments(op, (3, 1280), torch.bfloat16, **variant)
    found = []
    for late in (0, 1):
        dispatch.reset()
        with configs.forced(4, 1, late, 0):
            found.append(TRITON.outputs(op, a))
    assert all(twins.same_bits(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("name", ["rms", "add", "layer", "gated", "static", "token", "block"])
def test_every_table_serves_every_width(name: str) -> None:
    """Its limits ascend, and for every width it gives chunks that are powers of two and cover the row."""
    for gpu, tables in configs.tables().items():
        limits = [limit for limit, *_ in tables[name]]
        assert limits == sorted(limits)
        for width in [1, 7, 80, 128, 1000, 4096, 5120, 18432, 131072, 1 << 20]:
            for itemsize in (2, 4):
                made = configs.config(name, width, itemsize, gpu)
                assert made.block * (made.chunks - 1) < width <= made.block * made.chunks
                assert made.block & (made.block - 1) == 0
                assert 1 <= made.held <= made.chunks
                assert made.rows == 1 or made.chunks == 1
                assert made.with_row <= (made.held == made.chunks)
