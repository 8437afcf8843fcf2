"""Calls in any order are right. machine.py chooses them, running.py compares, guards.py guards the memory.

SEQUENCE_STEPS   how many calls; 10000 for a release
SEQUENCE_SEED    which; a failure names the one to repeat it with
"""

from __future__ import annotations

import os

import pytest
import torch

from norm_plugin.native import rms
from tests.kernels.device import INTERPRETED
from tests.sequences import machine
from tests.sequences.guards import BAND, Buffer, fresh

STEPS = int(os.environ.get("SEQUENCE_STEPS", 200 if INTERPRETED else 600))
SEED = int(os.environ.get("SEQUENCE_SEED", 14))


def test_any_order_is_right() -> None:
    try:
        done = machine.run(STEPS, SEED)
    except BaseException as error:
        error.add_note(f"repeat it with SEQUENCE_SEED={SEED} SEQUENCE_STEPS={STEPS}")
        raise
    assert done >= STEPS


# --- the guards themselves ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [-BAND, -1, 8, 15, 80, 80 + BAND - 1])
def test_a_write_beside_a_tensor_is_seen(place: int) -> None:
    """Before it, after it, and between its rows."""
    buffer = Buffer(80, torch.bfloat16, torch.device("cpu"))
    t = buffer.tensor("t", (5, 8), (18, 1))
    buffer.seal()
    t.fill_(1)
    buffer.check("t")
    with pytest.raises(AssertionError, match="guard: 40 elements"):
        buffer.check()
    buffer.raw[BAND + place] = 0
    with pytest.raises(AssertionError, match="guard: 1 elements"):
        buffer.check("t")


def test_what_an_op_allocates_is_guarded() -> None:
    x = torch.ones(3, 4, dtype=torch.float16)
    before = torch.empty, torch.empty_like, torch.empty_strided
    with fresh() as made:
        kept = torch.empty_like
        found = [
            torch.empty(3, 4),
            torch.empty((3, 4), dtype=torch.int8),
            torch.empty_like(x),
            rms.new_output(x),
            torch.empty_strided((3, 4), (9, 2)),
            x.new_empty((3, 4), dtype=torch.float32),
            x.new_empty_strided((3, 4), (1, 3)),
        ]
    assert rms.new_output.func is torch.empty_like
    assert before == (torch.empty, torch.empty_like, torch.empty_strided)
    assert [t.stride() for t in found] == [(4, 1)] * 4 + [(9, 2), (4, 1), (1, 3)]
    assert not made.guards(x)
    assert all(made.guards(t) and not t._is_view() for t in found)
    with fresh() as made_later:  # as by a launch that was bound in the block before
        later = kept(x)
    assert made_later.guards(later)
    assert not made.guards(later)
    made.check()
    for t in found:
        t.fill_(1)
    made.check()
    found[-1].as_strided((13,), (1,)).fill_(1)
    with pytest.raises(AssertionError, match="guard: 1 elements of the memory around an output changed, the first 12"):
        made.check()
