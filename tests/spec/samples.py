"""The tools of tests of all ops: arguments for every op, made from its schema, and the outputs of a call."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from norm_plugin import dispatch
from norm_plugin.accuracy import inputs, oracle
from norm_plugin.native.rms import wide_dtype
from norm_plugin.numerics import NUMERICS
from norm_plugin.op import Op
from norm_plugin.ops import OPS

Arguments = dict[str, Any]

NORM = [{}, *({"numerics": name} for name in NUMERICS if name != "fp32"), {"gemma": True}, {"weight": None}]
RMS = [*NORM, {"variance_size": 24}]
GATED = [
    {"norm_before_gate": before, "is_rms_norm": rms, "group_size": group, "activation": activation}
    for before, rms, group, activation in [
        (True, True, None, "silu"),
        (True, False, 16, "swish"),
        (False, True, 16, "silu"),
        (False, False, None, "sigmoid"),
    ]
]
DTYPES = [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8]
STATIC = [{"out_dtype": dtype} for dtype in DTYPES] + [{"numerics": "hf"}, {"gemma": True}, {"weight": None}]
DYNAMIC = [{"quant_dtype": dtype} for dtype in DTYPES] + [{"numerics": "hf"}, {"gemma": True}, {"residual": None}]

#: How each op is called in the tests of all ops. An op without a line here fails those tests.
VARIANTS: dict[str, list[Arguments]] = {
    "rmsnorm": RMS,
    "rmsnorm_out": RMS,
    "add_rmsnorm": RMS,
    "fused_add_rmsnorm": RMS,
    "l2norm": [{}, {"output_dtype": torch.float32}],
    "layernorm": [{}, {"bias": None}, {"weight": None, "bias": None}],
    "layernorm_linear": [{}, {"linear_bias": None}, {"weight": None, "bias": None}],
    "gated_norm": [*GATED, {"z": None}, {"bias": None, "numerics": "hf"}, {"weight": None, "bias": None}],
    "split_sums": [{}, {"z": None}],
    "split_rmsnorm": [{}, {"numerics": "hf"}, {"z": None}, {"weight": None, "numerics": "hf"}],
    "rmsnorm_quant": STATIC,
    "fused_add_rmsnorm_quant": STATIC,
    "rmsnorm_dynamic_quant": [*DYNAMIC, {"scale_ub": torch.tensor(1.5)}],
    "rmsnorm_block_quant": [*DYNAMIC, {"group_size": 16}],
    "layernorm_quant": [
        *({"out_dtype": dtype} for dtype in DTYPES),
        {"numerics": "flashinfer_layer"},
        {"weight": None, "bias": None},
    ],
}

#: Every op in every variant, for pytest.mark.parametrize(("op", "variant"), CASES, ids=IDS).
CASES = [(OPS[name], variant) for name, variants in VARIANTS.items() for variant in variants]


def label(name: str, variant: Arguments) -> str:
    """A readable name of a variant."""
    return "-".join([name, *(f"{key}={value}".removeprefix("torch.") for key, value in variant.items())])


IDS = [label(op.name, variant) for op, variant in CASES]

ALIKE_SEEDS = {"input": 1, "x": 1, "residual": 2, "z": 3}
FEATURES = 5

CPU = torch.device("cpu")


def arguments(
    op: Op,
    shape: Sequence[int],
    dtype: torch.dtype = torch.bfloat16,
    *,
    weight_dtype: torch.dtype | None = None,
    input_class: str = "normal",
    out_dtype: torch.dtype = torch.float8_e4m3fn,
    device: torch.device = CPU,
    **overrides: Any,
) -> Arguments:
    """All arguments of `op` by name, its tensors on a device. Sizes that must fit the width are brought down to fit
    it."""
    width, of_weight = shape[-1], weight_dtype or dtype
    made: Arguments = dict(zip(op.arguments, op.defaults, strict=True))
    for name in op.arguments:
        if name in ALIKE_SEEDS:
            values = input_class if name == op.arguments[op.x] else "normal"
            made[name] = inputs.make(values, shape, dtype, ALIKE_SEEDS[name])
    made |= {
        "weight": inputs.weights(width, of_weight),
        "bias": inputs.biases(width, of_weight),
        "out": torch.zeros(shape, dtype=out_dtype if "scale" in op.arguments else dtype),
        "scale": torch.tensor(0.02),
        "linear_weight": inputs.make("normal", (FEATURES, width), of_weight, 4),
        "linear_bias": inputs.biases(FEATURES, of_weight),
        **overrides,
    }
    made = moved(made, device)
    if "sums" in op.arguments:  # of a row whose other half has the same sum
        sums = 2 * oracle.split_sums(made["x"], made["z"])
        made = made | {"sums": sums.to(wide_dtype(dtype)), "full_width": 2 * width} | overrides
    if made.get("group_size"):
        made["group_size"] = math.gcd(made["group_size"], width)
    if made.get("variance_size"):
        made["variance_size"] = min(made["variance_size"], width)
    return moved({name: made[name] for name in op.arguments}, device)


def moved(a: Arguments, device: torch.device) -> Arguments:
    """The same, all tensors on a device."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in a.items()}


def alike(op: Op) -> tuple[str, ...]:
    """The names of x, of the tensors of its shape, and of those with one number for each row."""
    return op.arguments[op.x], *(op.arguments[i] for i in (*op.by_element, *op.one_a_row))


def written(op: Op, a: Arguments) -> tuple[str, ...]:
    """The names of the arguments that this call writes."""
    return tuple(op.arguments[i] for i in op.written if a[op.arguments[i]] is not None)


def call(op: Op, a: Arguments, *, through_torch: bool = False) -> Any:
    """Calls the op through one of its entries."""
    run = getattr(torch.ops.norm_plugin, op.name) if through_torch else partial(dispatch.call, op)
    return run(*a.values())


def outputs(
    op: Op, a: Arguments, *, through_torch: bool = False, call: Callable[..., Any] = call
) -> tuple[Tensor, ...]:
    """The returned outputs, then the written ones. Arguments that are written are copied first."""
    a = a | {name: copied(a[name]) for name in written(op, a)}
    returned = call(op, a, through_torch=through_torch)
    returned = (returned,) if isinstance(returned, Tensor) else returned or ()
    return *returned, *(a[name] for name in written(op, a))


def copied(t: Tensor) -> Tensor:
    """A copy with the same strides, gaps included."""
    copy = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
    copy.copy_(t)
    return copy
