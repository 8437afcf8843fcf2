"""nn.Modules with the constructor signatures of vLLM's and SGLang's norms, mamba_ssm's gated norms and torch's.

They write nothing in place, so they train, compile and export. With the numerics of an engine's layer they have the
bits of that layer. An argument that the originals have in different places is keyword-only. Constructors check their
arguments.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from norm_plugin import checks, functions, ops
from norm_plugin.native.rms import wide, wide_dtype
from norm_plugin.numerics import FP32, HF, NUMERICS
from norm_plugin.op import Op

__all__ = ["GemmaRMSNorm", "LayerNorm", "LayerNormGated", "RMSNorm", "RMSNormGated"]

Shape = int | Sequence[int]
Device = torch.device | str | int | None


def _check(op: Op, width: int, **arguments: Any) -> None:
    """Checks arguments that are known before the first call, by the rules of the op."""
    weight = torch.empty(width, device="meta")
    checks.Call("weight", {"weight": weight, **arguments}, op.numerics).check(op.rules)


class _Norm(nn.Module):
    """What all norms share: a weight and a bias, which may be absent, and their initial values."""

    weight: Tensor | None
    bias: Tensor | None
    first_weight: ClassVar[float] = 1.0

    def reset_parameters(self) -> None:
        """Gives the parameters the values of a new module."""
        for name, value in (("weight", self.first_weight), ("bias", 0.0)):
            parameter = getattr(self, name, None)
            if parameter is not None:
                nn.init.constant_(parameter, value)


class _RowNorm(_Norm):
    """What the norms of whole rows share: the dimensions that form a row, and eps."""

    def __init__(self, normalized_shape: Shape, eps: float | None) -> None:
        super().__init__()
        shape = normalized_shape if isinstance(normalized_shape, Sequence) else (normalized_shape,)
        self.normalized_shape = tuple(shape)
        self.hidden_size = math.prod(self.normalized_shape)
        self.variance_epsilon = eps

    @property
    def eps(self) -> float | None:
        """`variance_epsilon` under torch's name."""
        return self.variance_epsilon

    def _eps(self, x: Tensor) -> float:
        # torch's RMSNorm without eps takes the eps of the dtype that it computes in
        return torch.finfo(wide_dtype(x.dtype)).eps if self.variance_epsilon is None else self.variance_epsilon

    def _rows(self, name: str, x: Tensor) -> Tensor:
        """Checks x and returns it as rows."""
        last = x.shape[-len(self.normalized_shape) :]
        if last != self.normalized_shape and self.hidden_size:  # 0: a norm without weight takes any width
            raise ValueError(
                f"{name} has shape {list(x.shape)}; it must end in {list(self.normalized_shape)}, "
                f"what this {type(self).__name__} normalizes."
            )
        return self._flat(x)

    def _flat(self, t: Tensor) -> Tensor:
        """t with the normalized dimensions flattened to one."""
        dims = len(self.normalized_shape)
        return t if dims == 1 else t.flatten(-dims)

    def _restored(self, rows: Tensor, x: Tensor) -> Tensor:
        return rows if len(self.normalized_shape) == 1 else rows.reshape(x.shape)

    def extra_repr(self) -> str:
        shape = self.hidden_size if len(self.normalized_shape) == 1 else self.normalized_shape
        return f"{shape}, eps={self.variance_epsilon}"


class _ResidualNorm(_RowNorm):
    """The forward of RMSNorm and GemmaRMSNorm: a norm, or an add and a norm."""

    gemma: ClassVar[bool]
    numerics = FP32.name
    fp32_residual = False
    has_weight = True
    variance_size_override: int | None = None

    def forward(
        self, x: Tensor, residual: Tensor | None = None, post_residual_addition: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """norm(x). With a residual: (norm(h), h), where h = x + residual + post_residual_addition."""
        rows, eps, size = self._rows("x", x), self._eps(x), self.variance_size_override
        weight = self._flat(self.weight) if self.weight is not None and self.has_weight else None
        if residual is None:
            if post_residual_addition is not None:
                raise ValueError("post_residual_addition is given and residual is None; give both, or neither.")
            out = functions.rmsnorm(rows, weight, eps, numerics=self.numerics, gemma=self.gemma, variance_size=size)
            return self._restored(out, x)
        total = self._rows("residual", residual)
        total = wide(total) if self.fp32_residual else total
        dtype = total.dtype
        if post_residual_addition is not None:
            rows, total = self._added(rows, total, self._rows("post_residual_addition", post_residual_addition))
        out, new_residual = functions.add_rmsnorm(
            rows, total, weight, eps, numerics=self.numerics, gemma=self.gemma, variance_size=size
        )
        if new_residual.dtype != dtype:
            new_residual = new_residual.to(dtype)
        return self._restored(out, x), self._restored(new_residual, x)

    def _added(self, x: Tensor, residual: Tensor, addition: Tensor) -> tuple[Tensor, Tensor]:
        """Two tensors that add up to (x + residual) + addition."""
        checks.same_shape("residual", residual, "x", x)
        checks.same_shape("post_residual_addition", addition, "x", x)
        if addition.dtype != x.dtype:
            raise TypeError(f"post_residual_addition has dtype {addition.dtype}; it must be x's, {x.dtype}. Cast it.")
        if NUMERICS[self.numerics].output_of_rounded_sum:  # kernels that round this way get a rounded sum
            return x, residual + addition
        return addition, wide(x) + wide(residual)  # in SGLang's order, for the same bits


class RMSNorm(_ResidualNorm):
    """RMSNorm of vLLM, SGLang and torch; with a residual also their fused add and norm, not in place.

    cast_x_before_out_mul is numerics "hf". fp32_residual widens the residual, so the returned one is not rounded.
    """

    gemma = False

    def __init__(
        self,
        hidden_size: Shape,
        eps: float | None = 1e-6,
        var_hidden_size: int | None = None,
        *,
        has_weight: bool = True,
        dtype: torch.dtype | None = None,
        weight_dtype: torch.dtype | None = None,
        device: Device = None,
        elementwise_affine: bool = True,
        cast_x_before_out_mul: bool = False,
        fp32_residual: bool = False,
        numerics: str | None = None,
        override_orig_dtype: torch.dtype | None = None,
        x_pad_to_multiple: int = 0,
    ) -> None:
        super().__init__(hidden_size, eps)
        if isinstance(var_hidden_size, bool):  # it is torch's third argument; a bool is an int too
            raise TypeError(f"var_hidden_size is {var_hidden_size}; it must be a size. Name elementwise_affine.")
        if override_orig_dtype is not None:
            raise ValueError(f"override_orig_dtype is {override_orig_dtype}; it must be None. Cast x to that dtype.")
        if x_pad_to_multiple != 0:
            raise ValueError(f"x_pad_to_multiple is {x_pad_to_multiple}; it must be 0. Pad the output afterwards.")
        if dtype is not None and weight_dtype is not None and dtype != weight_dtype:
            raise ValueError(f"dtype is {dtype} and weight_dtype {weight_dtype}; both mean the weight's. Give one.")
        if cast_x_before_out_mul and numerics not in (None, HF.name):
            raise ValueError(f"numerics is {numerics!r} and cast_x_before_out_mul True, which is 'hf'. Give one.")
        self.numerics = numerics or (HF.name if cast_x_before_out_mul else FP32.name)
        self.cast_x_before_out_mul = self.numerics == HF.name
        self.fp32_residual = fp32_residual
        self.variance_size_override = None if var_hidden_size == self.hidden_size else var_hidden_size
        self.has_weight = has_weight and elementwise_affine
        if self.has_weight or self.hidden_size:
            _check(ops.RMSNORM, self.hidden_size, numerics=self.numerics, variance_size=self.variance_size_override)
        weight = torch.empty(self.normalized_shape, device=device, dtype=dtype or weight_dtype)
        if not elementwise_affine:
            self.register_parameter("weight", None)
        elif has_weight:
            self.weight = nn.Parameter(weight)
        else:  # engines read a weight of ones, which no checkpoint has
            self.register_buffer("weight", weight, persistent=False)
        self.reset_parameters()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, has_weight={self.has_weight}, numerics={self.numerics}"


class GemmaRMSNorm(_ResidualNorm):
    """RMSNorm that scales by 1 + weight, added in fp32; the weight starts at zero."""

    gemma = True
    first_weight = 0.0

    def __init__(
        self,
        hidden_size: Shape,
        eps: float = 1e-6,
        *,
        device: Device = None,
        dtype: torch.dtype | None = None,
        numerics: str = FP32.name,
    ) -> None:
        super().__init__(hidden_size, eps)
        _check(ops.RMSNORM, self.hidden_size, numerics=numerics)
        self.numerics = numerics
        self.weight = nn.Parameter(torch.empty(self.normalized_shape, device=device, dtype=dtype))
        self.reset_parameters()


class LayerNorm(_RowNorm):
    """LayerNorm of torch, vLLM and SGLang, with torch's state dict."""

    def __init__(
        self,
        hidden_size: Shape,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        *,
        device: Device = None,
        dtype: torch.dtype | None = None,
        numerics: str = FP32.name,
    ) -> None:
        super().__init__(hidden_size, eps)
        _check(ops.LAYERNORM, self.hidden_size, numerics=numerics)
        self.numerics = numerics
        self.elementwise_affine = elementwise_affine
        for name, wanted in (("weight", elementwise_affine), ("bias", elementwise_affine and bias)):
            empty = torch.empty(self.normalized_shape, device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(empty) if wanted else None)
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (p if p is None else self._flat(p) for p in (self.weight, self.bias))
        rows = functions.layernorm(self._rows("x", x), weight, bias, self._eps(x), numerics=self.numerics)
        return self._restored(rows, x)

    def extra_repr(self) -> str:
        bias = self.bias is not None
        affine = f"elementwise_affine={self.elementwise_affine}, bias={bias}"
        return f"{super().extra_repr()}, {affine}, numerics={self.numerics}"


class _GatedNorm(_Norm):
    """What the gated norms share. Without z there is no gate."""

    is_rms_norm: ClassVar[bool]
    weight: nn.Parameter

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        activation: str = "swish",
        *,
        numerics: str = FP32.name,
    ) -> None:
        super().__init__()
        _check(ops.GATED_NORM, hidden_size, group_size=group_size, activation=activation, numerics=numerics)
        self.numerics = numerics
        self.hidden_size, self.eps, self.group_size = hidden_size, eps, group_size
        self.norm_before_gate, self.activation = norm_before_gate, activation
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        bias = None if self.is_rms_norm else nn.Parameter(torch.empty_like(self.weight))
        self.register_parameter("bias", bias)
        self.reset_parameters()

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        how = (self.eps, self.group_size, self.norm_before_gate, self.is_rms_norm, self.activation)
        return functions.layernorm_fn(x, self.weight, self.bias, z, *how, numerics=self.numerics)

    def extra_repr(self) -> str:
        names = ("eps", "group_size", "norm_before_gate", "activation", "numerics")
        return ", ".join([str(self.hidden_size), *(f"{name}={getattr(self, name)}" for name in names)])


class LayerNormGated(_GatedNorm):
    """LayerNorm of mamba_ssm's gated norms. By default the gate comes after the norm, as there."""

    is_rms_norm = False


class RMSNormGated(_GatedNorm):
    """RMSNormGated of vLLM. By default the gate comes before the norm, as there."""

    is_rms_norm = True

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
        activation: str = "swish",
        *,
        numerics: str = FP32.name,
    ) -> None:
        super().__init__(hidden_size, eps, group_size, norm_before_gate, device, dtype, activation, numerics=numerics)
