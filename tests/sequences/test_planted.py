"""The sequences can fail: each of two planted defects is found, in a process of its own, whose memory it may spoil."""

from __future__ import annotations

import multiprocessing
import os
import re
import sys
import traceback
from multiprocessing.connection import Connection

import pytest

from tests.kernels.device import COMPILED, INTERPRETED
from tests.sequences import machine
from tests.sequences.planted import DEFECTS, planted

STEPS = 3000  # it ends at the first that is found, which is within 300 of most seeds
SEED = int(os.environ.get("SEQUENCE_SEED", 14))

#: Calls of what a defect is in: among all functions, it is a matter of luck when two calls of one signature meet.
ABOUT = {"output strides": ("rmsnorm", "layernorm"), "fallback": ("fused_add_rmsnorm",)}

#: How each defect shows.
SHOWS = {"output strides": r"guard: \d+ elements|beyond its bound", "fallback": "beyond its bound"}


def child(name: str, said: Connection) -> None:
    with planted(name):
        try:
            machine.run(STEPS, SEED, shrink=False, of=machine.about(*ABOUT[name]))
            said.send("")
        except BaseException:
            said.send(traceback.format_exc())


@pytest.mark.skipif(not (COMPILED or INTERPRETED), reason="the native path launches nothing")
@pytest.mark.skipif(COMPILED or sys.platform != "linux", reason="a process with a GPU cannot be forked")
@pytest.mark.parametrize("name", DEFECTS)
def test_a_planted_defect_is_found(name: str) -> None:
    mine, said = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=child, args=(name, said))
    process.start()
    said.close()
    try:
        found = mine.recv()
    except EOFError:
        found = "the process died"
    process.join()
    assert re.search(SHOWS[name] + "|the process died", found), found or f"{STEPS} steps noticed nothing"
