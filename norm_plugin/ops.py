"""The ops in torch.library: schema, native twin and fake. Their gradients are in `gradients`.

`torch.ops.norm_plugin.*` is the door for traced and differentiated code; `functions.py` takes the direct one where
only values are wanted. Both end in `dispatch.call`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from norm_plugin import library
from norm_plugin.dispatch import Op
from norm_plugin.library import Arguments
from norm_plugin.native import gated, layer, quant, rms, split
from norm_plugin.native.rms import new_output

OPS: dict[str, Op] = {}


def _register(
    schema: str,
    family: str,
    native: Callable[..., Any],
    fake: Callable[[Arguments], Any],
    x: str = "input",
    in_place: tuple[str, str] | None = None,
) -> Op:
    op = library.register(schema, family, native, fake, x, in_place)
    OPS[op.name] = op
    return op


def _nothing(a: Arguments) -> None:
    """The fake of an op that only writes its arguments."""


# --- rms ----------------------------------------------------------------------------------------------------------

_RMS = 'float eps=1e-6, str numerics="fp32", bool gemma=False, SymInt? variance_size=None, bool? enable_pdl=None'


def _rmsnorm_out(
    input: Tensor, weight: Tensor | None, out: Tensor, eps: float, numerics: str, gemma: bool, variance_size: int | None
) -> None:
    out.copy_(rms.rmsnorm(input, weight, eps, numerics, gemma, variance_size))


RMSNORM = _register(
    f"rmsnorm(Tensor input, Tensor? weight, {_RMS}) -> Tensor",
    "rms",
    rms.rmsnorm,
    lambda a: new_output(a["input"]),
)
RMSNORM_OUT = _register(
    f"rmsnorm_out(Tensor input, Tensor? weight, Tensor(a!) out, {_RMS}) -> ()",
    "rms",
    _rmsnorm_out,
    _nothing,
    in_place=("out", "input"),
)
ADD_RMSNORM = _register(
    f"add_rmsnorm(Tensor input, Tensor residual, Tensor? weight, {_RMS}) -> (Tensor, Tensor)",
    "rms",
    rms.add_rmsnorm,
    lambda a: (new_output(a["input"]), new_output(a["residual"])),
)
FUSED_ADD_RMSNORM = _register(
    f"fused_add_rmsnorm(Tensor(a!) input, Tensor(b!) residual, Tensor? weight, {_RMS}) -> ()",
    "rms",
    rms.fused_add_rmsnorm,
    _nothing,
)
L2NORM = _register(
    "l2norm(Tensor input, float eps=1e-6, ScalarType? output_dtype=None) -> Tensor",
    "rms",
    rms.l2norm,
    lambda a: new_output(a["input"], dtype=a["output_dtype"]),
)

# --- layer --------------------------------------------------------------------------------------------------------

LAYERNORM = _register(
    'layernorm(Tensor input, Tensor? weight, Tensor? bias, float eps=1e-6, str numerics="fp32") -> Tensor',
    "layer",
    layer.layernorm,
    lambda a: new_output(a["input"]),
)
LAYERNORM_LINEAR = _register(
    "layernorm_linear(Tensor x, Tensor? weight, Tensor? bias, Tensor linear_weight, Tensor? linear_bias, "
    "float eps=1e-6) -> Tensor",
    "layer",
    layer.layernorm_linear,
    lambda a: a["linear_weight"].new_empty((*a["x"].shape[:-1], a["linear_weight"].shape[0])),
    x="x",
)

# --- gated --------------------------------------------------------------------------------------------------------

GATED_NORM = _register(
    "gated_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor? z=None, float eps=1e-6, SymInt? group_size=None, "
    'bool norm_before_gate=True, bool is_rms_norm=False, str activation="silu", str numerics="fp32") -> Tensor',
    "gated",
    gated.gated_norm,
    lambda a: new_output(a["x"]),
    x="x",
)

# --- split ---------------------------------------------------------------------------------------------------------

SPLIT_SUMS = _register(
    'split_sums(Tensor x, Tensor? z, str numerics="fp32") -> Tensor',
    "split",
    split.split_sums,
    lambda a: a["x"].new_empty((*a["x"].shape[:-1], 1), dtype=rms.wide_dtype(a["x"].dtype)),
    x="x",
)
SPLIT_RMSNORM = _register(
    "split_rmsnorm(Tensor x, Tensor? weight, Tensor? z, Tensor sums, SymInt full_width, float eps=1e-6, "
    'str numerics="fp32") -> Tensor',
    "split",
    split.split_rmsnorm,
    lambda a: new_output(a["x"]),
    x="x",
)

# --- quant --------------------------------------------------------------------------------------------------------

_QUANT = 'str numerics="fp32", bool gemma=False, bool? enable_pdl=None'


def _quantised(a: Arguments, scales: int) -> tuple[Tensor, Tensor]:
    x = a["input"]
    scale = x.new_empty((*x.shape[:-1], scales), dtype=rms.wide_dtype(x.dtype))
    return new_output(x, dtype=a["quant_dtype"]), scale


RMSNORM_QUANT = _register(
    f"rmsnorm_quant(Tensor(a!) out, Tensor input, Tensor? weight, Tensor scale, float eps=1e-6, {_QUANT}) -> ()",
    "quant",
    quant.rmsnorm_quant,
    _nothing,
)
FUSED_ADD_RMSNORM_QUANT = _register(
    "fused_add_rmsnorm_quant(Tensor(a!) out, Tensor input, Tensor(b!) residual, Tensor? weight, Tensor scale, "
    f"float eps=1e-6, {_QUANT}) -> ()",
    "quant",
    quant.fused_add_rmsnorm_quant,
    _nothing,
)
RMSNORM_DYNAMIC_QUANT = _register(
    "rmsnorm_dynamic_quant(Tensor input, Tensor? weight, Tensor(a!)? residual=None, Tensor? scale_ub=None, "
    f"float eps=1e-6, ScalarType quant_dtype=float8_e4m3fn, {_QUANT}) -> (Tensor, Tensor)",
    "quant",
    quant.rmsnorm_dynamic_quant,
    lambda a: _quantised(a, 1),
)
RMSNORM_BLOCK_QUANT = _register(
    "rmsnorm_block_quant(Tensor input, Tensor? weight, Tensor(a!)? residual=None, float eps=1e-6, "
    f"SymInt group_size=128, ScalarType quant_dtype=float8_e4m3fn, {_QUANT}) -> (Tensor, Tensor)",
    "quant",
    quant.rmsnorm_block_quant,
    lambda a: _quantised(a, a["input"].shape[-1] // a["group_size"]),
)
LAYERNORM_QUANT = _register(
    "layernorm_quant(Tensor(a!) out, Tensor input, Tensor? weight, Tensor? bias, Tensor scale, float eps=1e-6, "
    'str numerics="fp32") -> ()',
    "quant",
    quant.layernorm_quant,
    _nothing,
)
