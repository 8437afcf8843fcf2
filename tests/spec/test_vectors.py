"""Runs the tests that compare bits with every other set of vectors that PyTorch's CPU kernels can use.

A process reads ATEN_CPU_CAPABILITY once. A sum has other bits with each value, and both sides of a comparison must have
the same bits. test_inductor.py chooses Inductor's vectors itself.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]

#: Those that this processor has: the others would kill it. The one that PyTorch chose is tested anyway.
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
