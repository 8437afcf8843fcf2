"""The ops: each is declared once. Its name, arguments and defaults are those of its native function.

Their gradients are in `gradients`, the public functions in `functions`.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from norm_plugin import library
from norm_plugin.library import Arguments
from norm_plugin.native import gated, layer, quant, rms, split
from norm_plugin.native.rms import new_output, wide_dtype
from norm_plugin.numerics import GATED_NUMERICS, LAYER_NUMERICS, LAYER_QUANT_NUMERICS, NUMERICS
from norm_plugin.op import Op

OPS: dict[str, Op] = {}

declare = partial(library.declare, OPS)

# --- rms ----------------------------------------------------------------------------------------------------------

RMSNORM = declare(rms.rmsnorm, normalized="input", shared="weight", numerics=NUMERICS)
RMSNORM_OUT = declare(
    rms.rmsnorm_out,
    normalized="input",
    by_element="out",
    shared="weight",
    written="out",
    may_be="out input",
    numerics=NUMERICS,
)
ADD_RMSNORM = declare(
    rms.add_rmsnorm,
    fake=lambda a: (new_output(a["input"]), new_output(a["residual"])),
    normalized="input",
    by_element="residual",
    shared="weight",
    numerics=NUMERICS,
)
FUSED_ADD_RMSNORM = declare(
    rms.fused_add_rmsnorm,
    normalized="input",
    by_element="residual",
    shared="weight",
    written="input residual",
    numerics=NUMERICS,
)
L2NORM = declare(rms.l2norm, fake=lambda a: new_output(a["input"], dtype=a["output_dtype"]), normalized="input")

# --- layer --------------------------------------------------------------------------------------------------------

LAYERNORM = declare(layer.layernorm, normalized="input", shared="weight bias", numerics=LAYER_NUMERICS)
LAYERNORM_LINEAR = declare(
    layer.layernorm_linear,
    fake=lambda a: a["linear_weight"].new_empty((*a["x"].shape[:-1], a["linear_weight"].shape[0])),
    normalized="x",
    shared="weight bias linear_weight linear_bias",
)

# --- gated --------------------------------------------------------------------------------------------------------

GATED_NORM = declare(gated.gated_norm, normalized="x", by_element="z", shared="weight bias", numerics=GATED_NUMERICS)

# --- split ---------------------------------------------------------------------------------------------------------

SPLIT_SUMS = declare(
    split.split_sums,
    fake=lambda a: a["x"].new_empty((*a["x"].shape[:-1], 1), dtype=wide_dtype(a["x"].dtype)),
    normalized="x",
    by_element="z",
    numerics=GATED_NUMERICS,
)
SPLIT_RMSNORM = declare(
    split.split_rmsnorm, normalized="x", by_element="z", one_a_row="sums", shared="weight", numerics=GATED_NUMERICS
)

# --- quant --------------------------------------------------------------------------------------------------------


def _quantised(a: Arguments, scales: int) -> tuple[Tensor, Tensor]:
    x = a["input"]
    scale = x.new_empty((*x.shape[:-1], scales), dtype=wide_dtype(x.dtype))
    return new_output(x, dtype=a["quant_dtype"]), scale


RMSNORM_QUANT = declare(
    quant.rmsnorm_quant, normalized="input", by_element="out", shared="weight scale", written="out", numerics=NUMERICS
)
FUSED_ADD_RMSNORM_QUANT = declare(
    quant.fused_add_rmsnorm_quant,
    normalized="input",
    by_element="out residual",
    shared="weight scale",
    written="out residual",
    numerics=NUMERICS,
)
RMSNORM_DYNAMIC_QUANT = declare(
    quant.rmsnorm_dynamic_quant,
    fake=lambda a: _quantised(a, 1),
    normalized="input",
    by_element="residual",
    shared="weight scale_ub",
    written="residual",
    numerics=NUMERICS,
)
RMSNORM_BLOCK_QUANT = declare(
    quant.rmsnorm_block_quant,
    fake=lambda a: _quantised(a, a["input"].shape[-1] // a["group_size"]),
    normalized="input",
    by_element="residual",
    shared="weight",
    written="residual",
    numerics=NUMERICS,
)
LAYERNORM_QUANT = declare(
    quant.layernorm_quant,
    normalized="input",
    by_element="out",
    shared="weight bias scale",
    written="out",
    numerics=LAYER_QUANT_NUMERICS,
)
