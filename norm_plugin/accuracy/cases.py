"""The cases to judge: every public function in each of its numerics, with its oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import norm_plugin
from norm_plugin.accuracy import bounds, inputs, oracle
from norm_plugin.numerics import FP32, GATED_NUMERICS, LAYER_NUMERICS, LAYER_QUANT_NUMERICS, NUMERICS

ROWS, WIDTH, GROUP, FEATURES = 16, 2048, 128, 64
EPS = 1e-6
QUANTISED = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}

Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Inputs:
    """The tensors of a call. Every op takes those that it needs."""

    x: Tensor
    residual: Tensor
    z: Tensor
    weight: Tensor
    bias: Tensor
    linear_weight: Tensor
    linear_bias: Tensor
    scale: Tensor

    @classmethod
    def make(cls, name: str, dtype: torch.dtype) -> Inputs:
        shape = (ROWS, WIDTH)
        return cls(
            x=inputs.make(name, shape, dtype, seed=1),
            residual=inputs.make(name, shape, dtype, seed=2),
            z=inputs.make("normal", shape, dtype, seed=3),
            weight=inputs.weights(WIDTH, dtype),
            bias=inputs.biases(WIDTH, dtype),
            linear_weight=inputs.make("normal", (FEATURES, WIDTH), dtype, seed=4),
            linear_bias=inputs.biases(FEATURES, dtype),
            scale=torch.tensor(0.02),
        )

    def to(self, device: torch.device) -> Inputs:
        return Inputs(**{name: tensor.to(device, copy=True) for name, tensor in vars(self).items()})


@dataclass(frozen=True)
class Case:
    """A call of a public function, and its oracle.

    `bound`: the error of the first output in fp32 before it is rounded. None: the bound of a product.
    """

    op: str
    variant: str
    numerics: str
    call: Callable[[Inputs], Outputs]
    oracle: Callable[[Inputs, float], Outputs]
    bound: Callable[[Inputs], Tensor] | None = None


def rms_cases(numerics: str, gemma: bool = False) -> Iterator[Case]:
    norm = norm_plugin.gemma_rmsnorm if gemma else norm_plugin.rmsnorm
    fused_norm = norm_plugin.gemma_fused_add_rmsnorm if gemma else norm_plugin.fused_add_rmsnorm

    def fused(i: Inputs) -> Outputs:
        fused_norm(i.x, i.residual, i.weight, EPS, numerics=numerics)
        return i.x, i.residual

    def add_oracle(i: Inputs, nudge: float) -> Outputs:
        return oracle.add_rmsnorm(i.x, i.residual, i.weight, EPS, numerics, gemma, nudge=nudge)

    yield Case(
        norm.__name__, "", numerics,
        lambda i: (norm(i.x, i.weight, EPS, numerics=numerics),),
        lambda i, nudge: (oracle.rmsnorm(i.x, i.weight, EPS, numerics, gemma, nudge=nudge),),
    )  # fmt: skip
    yield Case(fused_norm.__name__, "in place", numerics, fused, add_oracle)
    if not gemma:
        yield Case(
            "add_rmsnorm", "", numerics,
            lambda i: norm_plugin.add_rmsnorm(i.x, i.residual, i.weight, EPS, numerics=numerics),
            add_oracle,
        )  # fmt: skip


def l2norm_case() -> Case:
    return Case(
        "l2norm", "", "fp32",
        lambda i: (norm_plugin.l2norm(i.x, EPS),),
        lambda i, nudge: (oracle.l2norm(i.x, EPS),),
    )  # fmt: skip


def layernorm_case(numerics: str) -> Case:
    return Case(
        "layernorm", "", numerics,
        lambda i: (norm_plugin.layernorm(i.x, i.weight, i.bias, EPS, numerics=numerics),),
        lambda i, nudge: (oracle.layernorm(i.x, i.weight, i.bias, EPS),),
        lambda i: bounds.layernorm(i.x, i.weight, i.bias, EPS),
    )  # fmt: skip


def layer_cases() -> Iterator[Case]:
    for numerics in LAYER_NUMERICS.values():
        if not numerics.torch_functions:  # with a large mean it is thousands of ulps off: not ours to bound
            yield layernorm_case(numerics.name)
    yield Case(
        "layernorm_linear", "", "fp32",
        lambda i: (norm_plugin.layernorm_linear(i.x, i.weight, i.bias, i.linear_weight, i.linear_bias, EPS),),
        lambda i, nudge: (
            oracle.layernorm_linear(i.x, i.weight, i.bias, i.linear_weight, i.linear_bias, EPS, nudge),
        ),
        lambda i: bounds.layernorm_linear(i.x, i.weight, i.bias, i.linear_weight, i.linear_bias, EPS),
    )  # fmt: skip


def gated_cases(numerics: str, norm_before_gate: bool) -> Iterator[Case]:
    variant = "norm, then gate" if norm_before_gate else "gate, then norm"

    yield Case(
        "rmsnorm_fn", variant, numerics,
        lambda i: (
            norm_plugin.rmsnorm_fn(i.x, i.weight, None, i.z, EPS, GROUP, norm_before_gate, numerics=numerics),
        ),
        lambda i, nudge: (
            oracle.gated_norm(
                i.x, i.weight, None, i.z, EPS, GROUP, norm_before_gate, True, numerics=numerics, nudge=nudge
            ),
        ),
    )  # fmt: skip
    if numerics == "fp32":
        yield Case(
            "layernorm_fn", variant, numerics,
            lambda i: (norm_plugin.layernorm_fn(i.x, i.weight, i.bias, i.z, EPS, GROUP, norm_before_gate),),
            lambda i, nudge: (oracle.gated_norm(i.x, i.weight, i.bias, i.z, EPS, GROUP, norm_before_gate),),
            lambda i: bounds.gated_norm(i.x, i.weight, i.bias, i.z, EPS, GROUP, norm_before_gate),
        )  # fmt: skip


def quant_cases(name: str, dtype: torch.dtype, numerics: str) -> Iterator[Case]:
    def static(i: Inputs) -> Outputs:
        out = torch.empty_like(i.x, dtype=dtype)
        norm_plugin.rmsnorm_quant(out, i.x, i.weight, i.scale, EPS, numerics=numerics)
        return (out,)

    def fused_static(i: Inputs) -> Outputs:
        out = torch.empty_like(i.x, dtype=dtype)
        norm_plugin.fused_add_rmsnorm_quant(out, i.x, i.residual, i.weight, i.scale, EPS, numerics=numerics)
        return (out,)

    def norm(i: Inputs, nudge: float, residual: Tensor | None = None) -> Tensor:
        return oracle.to_quantise(i.x, i.weight, residual, EPS, numerics, nudge=nudge)

    def by_block(i: Inputs, nudge: float) -> Outputs:
        values, scales = oracle.by_own_scale(norm(i, nudge).unflatten(-1, (-1, GROUP)), dtype)
        return values.flatten(-2), scales[..., 0]

    yield Case(
        "rmsnorm_quant", name, numerics, static,
        lambda i, nudge: (oracle.quantised(norm(i, nudge), i.scale, dtype),),
    )  # fmt: skip
    yield Case(
        "fused_add_rmsnorm_quant", name, numerics, fused_static,
        lambda i, nudge: (oracle.quantised(norm(i, nudge, i.residual), i.scale, dtype),),
    )  # fmt: skip
    yield Case(
        "rmsnorm_dynamic_quant", name, numerics,
        lambda i: norm_plugin.rmsnorm_dynamic_quant(i.x, i.weight, None, EPS, dtype, numerics=numerics),
        lambda i, nudge: oracle.by_own_scale(norm(i, nudge), dtype),
    )  # fmt: skip
    yield Case(
        "rmsnorm_block_quant", name, numerics,
        lambda i: norm_plugin.rmsnorm_block_quant(i.x, i.weight, None, EPS, GROUP, dtype, numerics=numerics),
        by_block,
    )  # fmt: skip


def layernorm_quant_case(name: str, dtype: torch.dtype, numerics: str) -> Case:
    def static(i: Inputs) -> Outputs:
        out = torch.empty_like(i.x, dtype=dtype)
        norm_plugin.layernorm_quant(out, i.x, i.weight, i.bias, i.scale, EPS, numerics=numerics)
        return (out,)

    def truth(i: Inputs, nudge: float) -> Outputs:
        norm = oracle.layernorm_to_quantise(i.x, i.weight, i.bias, EPS, numerics, nudge)
        return (oracle.quantised(norm, i.scale, dtype),)

    def bound(i: Inputs) -> Tensor:
        off = bounds.layernorm_to_quantise(i.x, i.weight, i.bias, EPS, numerics) / i.scale.double()
        return off + bounds.product(truth(i, 0.0)[0], torch.float32)

    return Case("layernorm_quant", name, numerics, static, truth, bound)


def cases() -> list[Case]:
    """Every public function in each of its numerics."""
    found = [case for numerics in NUMERICS for case in rms_cases(numerics)]
    found += [*rms_cases(FP32.name, gemma=True), l2norm_case(), *layer_cases()]
    for numerics in GATED_NUMERICS:
        found += [case for before in (True, False) for case in gated_cases(numerics, before)]
    for numerics, how in NUMERICS.items():
        if not how.output_of_rounded_sum:  # what is rounded of a sum, the fused adds above show
            found += [case for name, dtype in QUANTISED.items() for case in quant_cases(name, dtype, numerics)]
    for numerics in LAYER_QUANT_NUMERICS:
        found += [layernorm_quant_case(name, dtype, numerics) for name, dtype in QUANTISED.items()]
    return sorted(found, key=lambda case: norm_plugin.__all__.index(case.op))
