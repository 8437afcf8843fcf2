"""Where the kernels run here: compiled on a GPU where there is one, else on the CPU in Triton's interpreter.

The interpreter is chosen by TRITON_INTERPRET=1, which must be set before triton is imported and holds for a whole
process: on CPU tensors, the other tests expect the native path. So these tests have a process of their own, and
scripts/test starts it.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch

from norm_plugin import kernels

INTERPRETED = kernels.interpreted()
COMPILED = torch.cuda.is_available() and not INTERPRETED
DEVICE = torch.device("cuda", torch.cuda.current_device()) if COMPILED else torch.device("cpu")


def why_not() -> str:
    """Why no kernel runs in this process, or ''."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not COMPILED and not INTERPRETED:
        return "there is no GPU, and TRITON_INTERPRET=1 is not set, which runs the kernels on the CPU"
    return ""


#: For tests of what an interpreter does not have: streams, graphs, memory, more than a few rows.
on_a_gpu = pytest.mark.skipif(not COMPILED, reason="needs a GPU: the interpreter has no streams, graphs or speed")
