"""The tests that compare bits, under every other set of vectors that PyTorch's CPU kernels can be told to use.

ATEN_CPU_CAPABILITY is read once a process. A sum has other bits with each, and both sides of a comparison have to have
the same others. Inductor's vectors are asked for in test_inductor.py itself.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]

#: What this processor has, which would die of the others. Under the one that PyTorch chose, these tests run anyway.
CAPABILITIES = ["default"]
CAPABILITIES += ["avx2"] * torch.cpu._is_avx2_supported() + ["avx512"] * torch.cpu._is_avx512_supported()
OTHERS = [name for name in CAPABILITIES if name != torch.backends.cpu.get_cpu_capability().lower()]

SPEC = "tests/spec"
BITS = (
    f"{SPEC}/test_inductor.py::test_eager_bits_are_those_of_the_functions",
    f"{SPEC}/test_rms.py::test_hf_numerics_have_the_bits_of_hugging_face",
    f"{SPEC}/test_rms.py::test_the_ops_that_write_give_the_bits_of_the_functional_ones",
    f"{SPEC}/test_layer.py::test_simple_layernorm_native_is_layernorm",
    f"{SPEC}/test_rows.py::test_a_row_does_not_depend_on_its_batch",
    "tests/layers/test_layers.py",
)


@pytest.mark.parametrize("capability", OTHERS)
def test_bits(capability: str) -> None:
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", *BITS]
    environ = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    ran = subprocess.run(tests, cwd=ROOT, env=environ, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-5000:] + ran.stderr[-2000:]
    assert " passed" in ran.stdout
