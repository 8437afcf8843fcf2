"""The cases to judge: every public function in each of its numerics, with its oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import norm_plugin
from norm_plugin.accuracy import bounds, inputs, oracle
from norm_plugin.numerics import FP32, GATED_NUMERICS, HF, LAYER_QUANT_NUMERICS, NUMERICS

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


def rms_cases(numerics: str) -> Iterator[Case]:
    def fused(i: Inputs) -> Outputs:
        norm_plugin.fused_add_rmsnorm(i.x, i.residual, i.weight, EPS, numerics=numerics)
        return i.x, i.residual

    def add_oracle(i: Inputs, nudge: float) -> Outputs:
        return oracle.add_rmsnorm(i.x, i.residual, i.weight, EPS, numerics, nudge=nudge)

    yield Case(
        "rmsnorm", "", numerics,
        lambda i: (norm_plugin.rmsnorm(i.x, i.weight, EPS, numerics=numerics),),
        lambda i, nudge: (oracle.rmsnorm(i.x, i.weight, EPS, numerics, nudge=nudge),),
    )  # fmt: skip
    yield Case("fused_add_rmsnorm", "in place", numerics, fused, add_oracle)
    yield Case(
        "add_rmsnorm", "", numerics,
        lambda i: norm_plugin.add_rmsnorm(i.x, i.residual, i.weight, EPS, numerics=numerics),
        add_oracle,
    )  # fmt: skip


def gemma_cases() -> Iterator[Case]:
    def fused(i: Inputs) -> Outputs:
        norm_plugin.gemma_fused_add_rmsnorm(i.x, i.residual, i.weight, EPS)
        return i.x, i.residual

    yield Case(
        "gemma_rmsnorm", "", "fp32",
        lambda i: (norm_plugin.gemma_rmsnorm(i.x, i.weight, EPS),),
        lambda i, nudge: (oracle.rmsnorm(i.x, i.weight, EPS, gemma=True, nudge=nudge),),
    )  # fmt: skip
    yield Case(
        "gemma_fused_add_rmsnorm", "in place", "fp32",
        fused,
        lambda i, nudge: oracle.add_rmsnorm(i.x, i.residual, i.weight, EPS, gemma=True, nudge=nudge),
    )  # fmt: skip
    yield Case(
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
    # not `torch`, which is PyTorch's own and off by thousands of ulps if the mean is large
    yield layernorm_case(FP32.name)
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

    yield Case(
        "rmsnorm_quant", name, numerics, static,
        lambda i, nudge: (
            oracle.rmsnorm_quant(i.x, i.weight, i.scale, dtype, None, EPS, numerics, nudge=nudge),
        ),
    )  # fmt: skip
    yield Case(
        "fused_add_rmsnorm_quant", name, numerics, fused_static,
        lambda i, nudge: (
            oracle.rmsnorm_quant(i.x, i.weight, i.scale, dtype, i.residual, EPS, numerics, nudge=nudge),
        ),
    )  # fmt: skip
    yield Case(
        "rmsnorm_dynamic_quant", name, numerics,
        lambda i: norm_plugin.rmsnorm_dynamic_quant(i.x, i.weight, None, EPS, dtype, numerics=numerics),
        lambda i, nudge: oracle.rmsnorm_dynamic_quant(
            i.x, i.weight, None, EPS, dtype, numerics=numerics, nudge=nudge
        ),
    )  # fmt: skip
    yield Case(
        "rmsnorm_block_quant", name, numerics,
        lambda i: norm_plugin.rmsnorm_block_quant(i.x, i.weight, None, EPS, GROUP, dtype, numerics=numerics),
        lambda i, nudge: oracle.rmsnorm_block_quant(
            i.x, i.weight, None, EPS, GROUP, dtype, numerics, nudge=nudge
        ),
    )  # fmt: skip


def layernorm_quant_case(name: str, dtype: torch.dtype, numerics: str) -> Case:
    def static(i: Inputs) -> Outputs:
        out = torch.empty_like(i.x, dtype=dtype)
        norm_plugin.layernorm_quant(out, i.x, i.weight, i.bias, i.scale, EPS, numerics=numerics)
        return (out,)

    def bound(i: Inputs) -> Tensor:
        off = bounds.layernorm_to_quantise(i.x, i.weight, i.bias, EPS, numerics) / i.scale.double()
        quotient = oracle.layernorm_quant(i.x, i.weight, i.bias, i.scale, dtype, EPS, numerics)
        return off + bounds.product(quotient, torch.float32)

    return Case(
        "layernorm_quant", name, numerics, static,
        lambda i, nudge: (oracle.layernorm_quant(i.x, i.weight, i.bias, i.scale, dtype, EPS, numerics, nudge),),
        bound,
    )  # fmt: skip


def cases() -> list[Case]:
    """Every public function in each of its numerics."""
    found = [case for numerics in NUMERICS for case in rms_cases(numerics)]
    found += [*gemma_cases(), *layer_cases()]
    for numerics in GATED_NUMERICS:
        found += [case for before in (True, False) for case in gated_cases(numerics, before)]
    for numerics in (FP32.name, HF.name):
        found += [case for name, dtype in QUANTISED.items() for case in quant_cases(name, dtype, numerics)]
    for numerics in LAYER_QUANT_NUMERICS:
        found += [layernorm_quant_case(name, dtype, numerics) for name, dtype in QUANTISED.items()]
    return sorted(found, key=lambda case: norm_plugin.__all__.index(case.op))
