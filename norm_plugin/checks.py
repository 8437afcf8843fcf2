"""Checks calls. Every message names the argument, what it is, and what it must be.

A tensor is checked by the rule of its role, unless its name has a rule of its own. Any other argument is checked by the
rule of its name, which means the same in every op. Nothing is written before all checks of a call have passed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from norm_plugin import memory
from norm_plugin.native.quant import QMAX
from norm_plugin.native.rms import wide_dtype
from norm_plugin.numerics import ACTIVATIONS
from norm_plugin.op import Op

ACTIVATION_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _names(dtypes: Collection[torch.dtype | None]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def _dtype(name: str, dtype: torch.dtype | None, allowed: Collection[torch.dtype]) -> None:
    if dtype not in allowed:
        raise TypeError(f"{name} has dtype {_names([dtype])}; it must be {_names(allowed)}. Cast it.")


def _one_of(name: str, value: str | None, allowed: Collection[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}.")


def _length(name: str, p: Tensor, length: int, of: str) -> None:
    if p.dim() != 1 or p.shape[0] != length:
        raise ValueError(f"{name} has shape {list(p.shape)}; it must be [{length}], the {of}.")


#: Checks one argument: its name and its value.
Rule = Callable[["Call", str, Any], None]


class Call:
    """The named arguments of one call, and the rules for them. `numerics` are those that the op knows."""

    def __init__(self, x_name: str, arguments: Mapping[str, Any], numerics: Collection[str] = ()) -> None:
        self.x_name, self.arguments, self.known_numerics = x_name, arguments, numerics
        self.x: Tensor = arguments[x_name]
        self.width = 0

    def check(self, rules: Mapping[str, Rule]) -> None:
        self.normalized(self.x_name, self.x)
        for name, value in self.arguments.items():
            if value is not None and name in rules:
                rules[name](self, name, value)
            if isinstance(value, Tensor) and value.device != self.x.device:
                raise ValueError(
                    f"{name} is on {value.device} and {self.x_name} on {self.x.device}; move {name} to {self.x.device}."
                )

    def given(self, tensors: Collection[str], required: Collection[str]) -> None:
        """Arguments in `tensors` must be tensors, and those in `required` must not be None."""
        for name, value in self.arguments.items():
            if value is None and name in required:
                raise TypeError(f"{name} is None, and it has no meaning then; give it.")
            if value is not None and name in tensors and not isinstance(value, Tensor):
                raise TypeError(f"{name} is of type {type(value).__name__}; it must be a tensor.")

    def normalized(self, name: str, x: Tensor) -> None:
        _dtype(name, x.dtype, ACTIVATION_DTYPES)
        self.width = x.shape[-1] if x.dim() else 0
        if self.width == 0:
            raise ValueError(
                f"{name} has shape {list(x.shape)}; "
                "it must have a last dimension, the one that is normalized, of at least one element."
            )

    def eps(self, name: str, eps: float) -> None:
        if isinstance(eps, bool) or not isinstance(eps, (int, float, torch.SymFloat)) or not 0 <= eps < math.inf:
            raise ValueError(f"{name} is {eps!r}; it must be a finite number of at least 0.")

    def per_element(self, name: str, other: Tensor) -> None:
        _dtype(name, other.dtype, ACTIVATION_DTYPES)

    def per_column(self, name: str, p: Tensor) -> None:
        _dtype(name, p.dtype, ACTIVATION_DTYPES)
        _length(name, p, self.width, f"last dimension of {self.x_name}")

    def per_row(self, name: str, other: Tensor) -> None:
        _dtype(name, other.dtype, [wide_dtype(self.x.dtype)])

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

    def numerics(self, name: str, value: str) -> None:
        _one_of(name, value, self.known_numerics)

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

    def group(self, name: str, group: str) -> None:
        if not isinstance(group, str) or not group:
            raise TypeError(f"{name} is {group!r}; it must be the name of a process group.")

    def linear_weight(self, name: str, weight: Tensor) -> None:
        _dtype(name, weight.dtype, ACTIVATION_DTYPES)
        if weight.dim() != 2 or weight.shape[1] != self.width:
            raise ValueError(f"{name} has shape {list(weight.shape)}; it must be [out_features, {self.width}].")

    def linear_bias(self, name: str, bias: Tensor) -> None:
        weight = self.arguments["linear_weight"]
        _dtype(name, bias.dtype, [weight.dtype])
        _length(name, bias, weight.shape[0], "number of rows of linear_weight")


#: The rules of names. A tensor whose name has none is checked by the rule of its role.
RULES: dict[str, Rule] = {
    "out": Call.out,
    "scale": Call.scale,
    "scale_ub": Call.scale,
    "quant_dtype": Call.quant_dtype,
    "output_dtype": Call.output_dtype,
    "eps": Call.eps,
    "numerics": Call.numerics,
    "activation": Call.activation,
    "group_size": Call.group_size,
    "variance_size": Call.variance_size,
    "full_width": Call.full_width,
    "group": Call.group,
    "linear_weight": Call.linear_weight,
    "linear_bias": Call.linear_bias,
}


def check(op: Op, args: tuple[Any, ...]) -> None:
    """All checks but those of memory, for a call that has no route yet, or is fake and never gets one."""
    call = Call(op.arguments[op.x], dict(zip(op.arguments, args, strict=True)), op.numerics)
    call.given(op.tensors, op.required)
    call.check(op.rules)
    check_shapes(op, args)
    for i in op.written:
        if args[i] is not None:
            writable(op.arguments[i], args[i])


def check_shapes(op: Op, args: tuple[Any, ...]) -> None:
    """The checks of what may change within a signature: the number of rows."""
    x = args[op.x]
    for i in op.by_element:
        if args[i] is not None and args[i].shape != x.shape:
            same_shape(op.arguments[i], args[i], op.arguments[op.x], x)
    for i in op.one_a_row:
        one_a_row(op.arguments[i], args[i], op.arguments[op.x], x)


def check_memory(op: Op, args: tuple[Any, ...]) -> None:
    """The checks of real tensors: each written element has memory of its own, which no other argument shares."""
    if args[op.x].is_meta:
        return
    for i in op.written:
        if args[i] is not None:
            own_memory(op.arguments[i], args[i])
    for i, j in op.pairs:
        a, b = args[i], args[j]
        if a is None or b is None or ((i, j) == op.may_be and memory.same(a, b)):
            continue
        apart(op.arguments[i], a, op.arguments[j], b, j in op.written)


def same_shape(name: str, other: Tensor, x_name: str, x: Tensor) -> None:
    """`other` must have the shape of x."""
    if other.shape != x.shape:
        raise ValueError(f"{name} has shape {list(other.shape)}; it must have the shape of {x_name}, {list(x.shape)}.")


def one_a_row(name: str, other: Tensor, x_name: str, x: Tensor) -> None:
    """`other` must have one number for each row of x."""
    expected = [*x.shape[:-1], 1]
    if list(other.shape) != expected:
        raise ValueError(f"{name} has shape {list(other.shape)}; it must be {expected}, one number a row of {x_name}.")


def writable(name: str, t: Tensor) -> None:
    """t is written in place, so its rows must be dense and not expanded."""
    strides = list(t.stride())
    if t.shape[-1] > 1 and strides[-1] != 1:
        raise ValueError(f"{name} has strides {strides}; it is written, so its last stride must be 1.")
    if any(size > 1 and stride == 0 for size, stride in zip(t.shape, strides, strict=True)):
        raise ValueError(f"{name} is expanded (strides {strides}); it is written, so clone it first.")


def own_memory(name: str, t: Tensor) -> None:
    """t is written, so torch must allow it (it refuses too late, maybe after it has written another tensor), and each
    of its elements must have memory of its own."""
    if t.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"{name} is an inference tensor, and it is written in place, which torch allows under "
            "torch.inference_mode() alone; pass a clone of it."
        )
    if memory.covers_itself(t):
        raise ValueError(
            f"{name} has shape {list(t.shape)} and strides {list(t.stride())}, so some of its elements are the same "
            "memory; it is written, so clone it first."
        )


def apart(name: str, t: Tensor, other_name: str, other: Tensor, both_written: bool) -> None:
    """t is written, so `other` must not share memory with it."""
    if not memory.overlap(t, other):
        return
    if both_written and memory.same(t, other):
        raise ValueError(f"{name} and {other_name} are the same memory, and both are written; clone one of them.")
    written = "both are" if both_written else f"{name} is"
    raise ValueError(f"{name} and {other_name} overlap in memory, and {written} written; clone one of them.")


def recorded_writing(name: str, t: Tensor) -> None:
    """t is written while gradients are recorded. Refuses what torch would refuse too late, after another write."""
    base = t._base if t._is_view() else t
    if base is not None and base.is_leaf and base.requires_grad:
        raise RuntimeError(f"{name} is a leaf that requires a gradient, and it is written in place; pass a copy of it.")
    if t._is_view() and t.requires_grad and torch._C._autograd._get_creation_meta(t) != _USUAL_VIEW:
        raise RuntimeError(
            f"{name} is a view that torch does not let be written where gradients are recorded (one of several that a "
            "split or chunk returned, or one made under no_grad); pass a clone of it."
        )


_USUAL_VIEW = torch._C._autograd.CreationMeta.DEFAULT
