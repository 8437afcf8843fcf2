"""What a call must satisfy. Every message names the argument, what it is, and what it must be.

An argument of one name means the same in every op, so there is one rule a name. Nothing is modified before all of a
call's rules hold.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from norm_plugin.native.quant import QMAX
from norm_plugin.native.rms import wide_dtype
from norm_plugin.numerics import ACTIVATIONS, GATED_NUMERICS, LAYER_NUMERICS, NUMERICS

ACTIVATION_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

#: The arguments that go with x element by element.
ALIKE = ("residual", "out", "z", "grad", "residual_grad")

#: The arguments that have one number for each row of x.
ONE_A_ROW = ("sums",)


def _names(dtypes: Collection[torch.dtype]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def _dtype(name: str, dtype: torch.dtype, allowed: Collection[torch.dtype]) -> None:
    if dtype not in allowed:
        raise TypeError(f"{name} has dtype {_names([dtype])}; it must be {_names(allowed)}. Cast it.")


def _one_of(name: str, value: str, allowed: Collection[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}.")


def _length(name: str, p: Tensor, length: int, of: str) -> None:
    if p.dim() != 1 or p.shape[0] != length:
        raise ValueError(f"{name} has shape {list(p.shape)}; it must be [{length}], the {of}.")


class Call:
    """The named arguments of one call, and the rules for them."""

    def __init__(self, x_name: str, arguments: Mapping[str, Any]) -> None:
        self.x_name, self.arguments = x_name, arguments
        self.x: Tensor = arguments[x_name]
        self.width = self.x.shape[-1] if self.x.dim() else 0

    def check(self) -> None:
        self.normalized()
        for name, value in self.arguments.items():
            rule = RULES.get(name)
            if rule is not None and value is not None:
                rule(self, name, value)
            if isinstance(value, Tensor) and value.device != self.x.device:
                raise ValueError(
                    f"{name} is on {value.device} and {self.x_name} on {self.x.device}; move {name} to {self.x.device}."
                )

    def normalized(self) -> None:
        _dtype(self.x_name, self.x.dtype, ACTIVATION_DTYPES)
        if self.width == 0:
            raise ValueError(
                f"{self.x_name} has shape {list(self.x.shape)}; "
                "it must have a last dimension, the one that is normalized, of at least one element."
            )

    def per_element(self, name: str, other: Tensor) -> None:
        _dtype(name, other.dtype, ACTIVATION_DTYPES)

    def per_column(self, name: str, p: Tensor) -> None:
        _dtype(name, p.dtype, ACTIVATION_DTYPES)
        _length(name, p, self.width, f"last dimension of {self.x_name}")

    def sums(self, name: str, sums: Tensor) -> None:
        _dtype(name, sums.dtype, [wide_dtype(self.x.dtype)])

    def out(self, name: str, out: Tensor) -> None:
        _dtype(name, out.dtype, QMAX if "scale" in self.arguments else [self.x.dtype])

    def scale(self, name: str, scale: Tensor) -> None:
        if scale.numel() != 1:
            raise ValueError(f"{name} has shape {list(scale.shape)}; it must hold exactly one element.")
        _dtype(name, scale.dtype, ACTIVATION_DTYPES)

    def quant_dtype(self, name: str, dtype: torch.dtype) -> None:
        _dtype(name, dtype, QMAX)

    def output_dtype(self, name: str, dtype: torch.dtype) -> None:
        _dtype(name, dtype, ACTIVATION_DTYPES)

    def gemma(self, name: str, gemma: bool) -> None:
        if gemma and self.arguments["weight"] is None:
            raise ValueError("weight is None; Gemma's norm scales by 1 + weight and needs one.")

    def numerics(self, name: str, value: str) -> None:
        allowed = LAYER_NUMERICS if "bias" in self.arguments else NUMERICS
        _one_of(name, value, GATED_NUMERICS if "z" in self.arguments else allowed)

    def activation(self, name: str, value: str) -> None:
        _one_of(name, value, ACTIVATIONS)

    def group_size(self, name: str, size: int) -> None:
        if size <= 0 or self.width % size != 0:
            raise ValueError(f"{name} is {size}; it must divide the last dimension of {self.x_name}, {self.width}.")

    def variance_size(self, name: str, size: int) -> None:
        if not 0 < size <= self.width:
            raise ValueError(f"{name} is {size}; it must lie in 1..{self.width}, the last dimension of {self.x_name}.")

    def full_width(self, name: str, width: int) -> None:
        if width < self.width:
            raise ValueError(
                f"{name} is {width}; it must be at least {self.width}, the last dimension of {self.x_name}."
            )

    def linear_weight(self, name: str, weight: Tensor) -> None:
        _dtype(name, weight.dtype, ACTIVATION_DTYPES)
        if weight.dim() != 2 or weight.shape[1] != self.width:
            raise ValueError(f"{name} has shape {list(weight.shape)}; it must be [out_features, {self.width}].")

    def linear_bias(self, name: str, bias: Tensor) -> None:
        weight = self.arguments["linear_weight"]
        _dtype(name, bias.dtype, [weight.dtype])
        _length(name, bias, weight.shape[0], "number of rows of linear_weight")


RULES: dict[str, Callable[[Call, str, Any], None]] = {
    "residual": Call.per_element,
    "z": Call.per_element,
    "grad": Call.per_element,
    "residual_grad": Call.per_element,
    "weight": Call.per_column,
    "bias": Call.per_column,
    "sums": Call.sums,
    "out": Call.out,
    "scale": Call.scale,
    "scale_ub": Call.scale,
    "quant_dtype": Call.quant_dtype,
    "output_dtype": Call.output_dtype,
    "gemma": Call.gemma,
    "numerics": Call.numerics,
    "activation": Call.activation,
    "group_size": Call.group_size,
    "variance_size": Call.variance_size,
    "full_width": Call.full_width,
    "linear_weight": Call.linear_weight,
    "linear_bias": Call.linear_bias,
}


def same_shape(name: str, other: Tensor, x_name: str, x: Tensor) -> None:
    """`other` goes element by element with x."""
    if other.shape != x.shape:
        raise ValueError(f"{name} has shape {list(other.shape)}; it must have the shape of {x_name}, {list(x.shape)}.")


def one_a_row(name: str, other: Tensor, x_name: str, x: Tensor) -> None:
    """`other` has one number for each row of x."""
    expected = [*x.shape[:-1], 1]
    if list(other.shape) != expected:
        raise ValueError(f"{name} has shape {list(other.shape)}; it must be {expected}, one number a row of {x_name}.")


def writable(name: str, t: Tensor) -> None:
    """t is written in place, row by row."""
    strides = list(t.stride())
    if t.shape[-1] > 1 and strides[-1] != 1:
        raise ValueError(f"{name} has strides {strides}; it is written, so its last stride must be 1.")
    if any(size > 1 and stride == 0 for size, stride in zip(t.shape, strides, strict=True)):
        raise ValueError(f"{name} is expanded (strides {strides}); it is written, so clone it first.")


def disjoint(name: str, a: Tensor, other_name: str, b: Tensor) -> None:
    """Both are written, so they may not be one tensor."""
    if a.numel() and a.data_ptr() == b.data_ptr():
        raise ValueError(f"{name} and {other_name} are the same memory, and both are written; clone one of them.")


def no_leaf(name: str, t: Tensor) -> None:
    """t is written where gradients are recorded: torch refuses that for a leaf, but only once it comes to it."""
    base = t._base if t._is_view() else t
    if base is not None and base.is_leaf and base.requires_grad:
        raise RuntimeError(f"{name} is a leaf that requires a gradient, and it is written in place; pass a copy of it.")
