"""With NORM_PLUGIN_COMPILE=1 the values are right too: Inductor may reorder sums, but it drops no named rounding.

The bounds are those of the eager ops. Left to itself, Inductor removes a rounding to bf16 if a step back to fp32
follows. That would change one value in four under the numerics that round before the weight.
"""

from __future__ import annotations

import shutil

import pytest
import torch

from norm_plugin import dispatch, settings
from norm_plugin.numerics import LAYER_QUANT_NUMERICS, NUMERICS
from norm_plugin.ops import OPS
from tests.spec import judge, samples

CASES: list[tuple[str, samples.Arguments]] = [
    *(("add_rmsnorm", {"numerics": name}) for name in NUMERICS),
    ("rmsnorm", {"numerics": "hf"}),
    ("fused_add_rmsnorm", {"numerics": "sgl_jit"}),
    ("l2norm", {}),
    ("layernorm", {}),
    ("layernorm_linear", {}),
    ("gated_norm", {"numerics": "hf", "group_size": 16}),
    ("gated_norm", {"norm_before_gate": False, "is_rms_norm": True, "group_size": 16}),
    ("split_sums", {}),
    ("split_rmsnorm", {"numerics": "hf"}),
    ("rmsnorm_dynamic_quant", {"numerics": "hf", "quant_dtype": torch.int8}),
    ("rmsnorm_block_quant", {"group_size": 16}),
    *(("layernorm_quant", {"numerics": name}) for name in LAYER_QUANT_NUMERICS),
]

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="Inductor needs a C++ compiler"
)


@pytest.mark.parametrize(("name", "variant"), CASES, ids=[samples.label(*case) for case in CASES])
def test_compiled(name: str, variant: samples.Arguments) -> None:
    op = OPS[name]
    a = samples.arguments(op, (64, 192), torch.bfloat16, **variant)
    eager = samples.outputs(op, a)
    with settings.override(compile=True, strict=True):
        compiled = samples.outputs(op, a)
        assert {route.backend for route in dispatch.routes()} == {"native, compiled"}
    judge.check(op, a, compiled)
    assert [t.stride() for t in compiled] == [t.stride() for t in eager]
