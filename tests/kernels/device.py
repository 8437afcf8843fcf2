"""Where the kernels run here: on a GPU if there is one, else on the CPU in Triton's interpreter.

TRITON_INTERPRET=1 chooses the interpreter. It must be set before triton is imported, and holds for the whole process.
Other tests expect CPU tensors to take the native path. So scripts/test starts another process for these tests.
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


#: For tests that an interpreter cannot run: of streams, graphs, memory, or many rows.
on_a_gpu = pytest.mark.skipif(not COMPILED, reason="needs a GPU: the interpreter has no streams, graphs or speed")
