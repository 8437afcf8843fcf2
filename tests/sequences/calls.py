"""The public functions as data: their arguments, and the calls that hypothesis may choose.

Strides follow from a layout and from all sizes but the number of rows, so that calls with other numbers of rows share a
signature. For the same reason there are few widths.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import norm_plugin
from norm_plugin.native.quant import QMAX
from norm_plugin.numerics import ACTIVATIONS, FP32, HF, LAYER_QUANT_NUMERICS, NUMERICS
from norm_plugin.op import Op
from norm_plugin.ops import OPS
from tests.kernels.device import COMPILED, INTERPRETED

Arguments = dict[str, Any]

WIDTHS = (40, 512) if COMPILED else (1, 40, 64, 512)  # on a GPU, each kernel takes a second to compile
MANY = 600 if COMPILED else 5 if INTERPRETED else 33  # in the interpreter, a program is some milliseconds
ROWS = (0, 1, 2, 3, MANY)
INNER = ((), (2,), (1, 2)) if INTERPRETED else ((), (3,), (2, 2))
DTYPES = (torch.bfloat16, torch.float32) if COMPILED else (torch.float16, torch.bfloat16, torch.float32)
FEATURES = 5

#: Under the numerics `torch` of the gated norms the errors are PyTorch's own, so no bound of ours holds.
NUMERICS_OF = {"gated": (FP32.name, HF.name), "layer": (FP32.name,)}
NUMERICS_OF_OP = {"layernorm_quant": tuple(LAYER_QUANT_NUMERICS)}


@dataclass(frozen=True)
class Function:
    """A public function: its op, its call on the arguments of the op, and those that it does not choose."""

    name: str
    op: Op
    call: Callable[..., Any]
    fixed: Mapping[str, Any] = field(default_factory=dict)

    @property
    def by_row(self) -> tuple[str, ...]:
        """The tensors that have a row for each row of x, x first."""
        return tuple(self.op.arguments[i] for i in (self.op.x, *self.op.by_element))

    @property
    def written(self) -> tuple[str, ...]:
        return tuple(self.op.arguments[i] for i in self.op.written)

    @property
    def pair(self) -> tuple[str, str] | None:
        """Two tensors of one dtype that are added, or of which at least one is written."""
        second = "residual" if "residual" in self.op.arguments else "out"
        return ("input", second) if second in self.op.arguments and "layernorm" not in self.name else None

    @property
    def differentiable(self) -> bool:
        return self.op.kind != "quant"

    @property
    def needs_residual(self) -> bool:
        return "add_" in self.name


def _function(name: str, op: str, order: str, named: str = "", **fixed: Any) -> Function:
    """A function by the names of its positional arguments, in order, and of its keyword arguments."""
    function = getattr(norm_plugin, name.removesuffix("_out"))

    def call(a: Arguments) -> Any:
        return function(*(a[key] for key in order.split()), **{key: a[key] for key in named.split()})

    return Function(name, OPS[op], call, fixed)


_RMS = "numerics gemma variance_size enable_pdl"
FUNCTIONS = {
    f.name: f
    for f in (
        _function("rmsnorm", "rmsnorm", "input weight eps", _RMS),
        _function("rmsnorm_out", "rmsnorm_out", "input weight eps out", _RMS),
        _function("gemma_rmsnorm", "rmsnorm", "input weight eps", "numerics enable_pdl", gemma=True,
                  variance_size=None),
        _function("gemma_rmsnorm_out", "rmsnorm_out", "input weight eps out", "numerics enable_pdl", gemma=True,
                  variance_size=None),
        _function("fused_add_rmsnorm", "fused_add_rmsnorm", "input residual weight eps enable_pdl", "numerics",
                  gemma=False, variance_size=None),
        _function("gemma_fused_add_rmsnorm", "fused_add_rmsnorm", "input residual weight eps enable_pdl", "numerics",
                  gemma=True, variance_size=None),
        _function("add_rmsnorm", "add_rmsnorm", "input residual weight eps", "numerics gemma variance_size",
                  enable_pdl=None),
        _function("l2norm", "l2norm", "input eps output_dtype"),
        _function("layernorm", "layernorm", "input weight bias eps", "numerics"),
        _function("layernorm_linear", "layernorm_linear", "x weight bias linear_weight linear_bias eps"),
        _function("layernorm_fn", "gated_norm",
                  "x weight bias z eps group_size norm_before_gate is_rms_norm activation", "numerics"),
        _function("rmsnorm_fn", "gated_norm", "x weight bias z eps group_size norm_before_gate activation", "numerics",
                  is_rms_norm=True),
        _function("rmsnorm_quant", "rmsnorm_quant", "out input weight scale eps enable_pdl", "numerics gemma"),
        _function("fused_add_rmsnorm_quant", "fused_add_rmsnorm_quant",
                  "out input residual weight scale eps enable_pdl", "numerics gemma"),
        _function("rmsnorm_dynamic_quant", "rmsnorm_dynamic_quant",
                  "input weight residual eps quant_dtype scale_ub", "numerics gemma", enable_pdl=None),
        _function("rmsnorm_block_quant", "rmsnorm_block_quant", "input weight residual eps group_size quant_dtype",
                  "numerics gemma", enable_pdl=None),
        _function("layernorm_quant", "layernorm_quant", "out input weight bias scale eps", "numerics"),
    )
}  # fmt: skip

# --- where rows lie -----------------------------------------------------------------------------------------------

Layout = Callable[[tuple[int, ...], int], tuple[int, ...]]


def _dense(inner: tuple[int, ...], row: int) -> tuple[int, ...]:
    """The strides of the leading dimensions, for rows that are `row` apart. The first dimension may have any size."""
    strides = [row]
    for size in reversed(inner):
        strides.insert(0, strides[0] * size)
    return tuple(strides)


def contiguous(inner: tuple[int, ...], width: int) -> tuple[int, ...]:
    return (*_dense(inner, width), 1)


def padded(inner: tuple[int, ...], width: int) -> tuple[int, ...]:
    """The first columns of a wider buffer, such as 512 of 576."""
    return (*_dense(inner, width + max(8, width // 8)), 1)


def oddly_padded(inner: tuple[int, ...], width: int) -> tuple[int, ...]:
    """The first columns of a buffer whose rows are not aligned."""
    return (*_dense(inner, width + 3), 1)


def transposed(inner: tuple[int, ...], width: int) -> tuple[int, ...]:
    """The first dimension innermost in memory, in a buffer for MANY."""
    rest = _dense(inner[1:], width * MANY) if inner else ()
    return (width, *rest, 1)


def with_gaps(inner: tuple[int, ...], width: int) -> tuple[int, ...]:
    """A gap after each entry of the first dimension, so that its stride is no multiple of the next."""
    first, *rest = _dense(inner, width)
    return (first + 16, *rest, 1)


def every_second(inner: tuple[int, ...], width: int) -> tuple[int, ...]:
    """A last stride of 2."""
    return (*_dense(inner, 2 * width), 2)


def expanded(inner: tuple[int, ...], width: int) -> tuple[int, ...]:
    """The same memory for each of the first dimension."""
    return (0, *_dense(inner, width)[1:], 1)


def unfolded(inner: tuple[int, ...], width: int) -> tuple[int, ...]:
    """Rows that begin one element after each other."""
    return (*_dense(inner, 1), 1)


WRITABLE: dict[str, Layout] = {f.__name__: f for f in (contiguous, padded, oddly_padded, transposed, with_gaps)}
READABLE = WRITABLE | {f.__name__: f for f in (every_second, expanded, unfolded)}
OFFSETS = (0, 0, 8, 1, 5)

#: How the two tensors of a pair share memory.
APART, SIDE_BY_SIDE, SAME, OVERLAPPING, INTO_PARAMETERS = "apart", "side by side", "same", "overlapping", "weight"

#: How a function is called: for values only, on inference tensors outside of inference_mode, with a written leaf that
#: requires a gradient, or for gradients too.
MODES = ("plain", "plain", "no_grad", "inference", "inference tensors", "leaf", "backward", "backward")


@dataclass(frozen=True)
class Step:
    """The choices of one call."""

    function: str
    rows: int | None  # None: a tensor of one dimension
    inner: tuple[int, ...]
    width: int
    dtype: torch.dtype
    weight_dtype: torch.dtype
    residual_dtype: torch.dtype
    out_dtype: torch.dtype
    absent: frozenset[str]
    layouts: tuple[str, str, str]  # of x, of what is read beside it, of what is written
    offset: int
    shift: int  # of the second tensor against the first, where they share memory; -1 is a row
    relation: str
    mode: str
    plain: tuple[tuple[str, Any], ...]
    seed: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.width,) if self.rows is None else (self.rows, *self.inner, self.width)

    def strides(self, layout: str) -> tuple[int, ...]:
        strides = READABLE[layout](self.inner, self.width)
        return strides[-1:] if self.rows is None else strides


def _plain(draw: Callable[..., Any], f: Function, width: int) -> tuple[tuple[str, Any], ...]:
    """The arguments other than tensors."""
    groups = [n for n in (1, 8, 20, 64, 128, width) if width % n == 0]
    quantised = f.op.kind == "quant"
    choices: dict[str, tuple[Any, ...]] = {
        "eps": (1e-6, 1e-6, 1e-5),
        "numerics": NUMERICS_OF_OP.get(f.op.name) or NUMERICS_OF.get(f.op.kind) or tuple(NUMERICS),
        "gemma": (False, False, True),
        "variance_size": (None, None, None, max(1, width // 2)),
        "output_dtype": (None, torch.float32),
        "group_size": tuple(groups) if quantised else (None, *groups),
        "norm_before_gate": (True, False),
        "is_rms_norm": (True, False),
        "activation": ACTIVATIONS,
        "enable_pdl": (None, None, True, False),
        "quant_dtype": tuple(QMAX),
    }
    names = [name for name in f.op.arguments if name in choices and name not in f.fixed]
    return (*f.fixed.items(), *((name, draw(st.sampled_from(choices[name]))) for name in names))


@st.composite
def steps(draw: Callable[..., Any], functions: tuple[str, ...] = tuple(FUNCTIONS)) -> Step:
    """Any call."""
    f = FUNCTIONS[draw(st.sampled_from(functions))]
    width, dtype = draw(st.sampled_from(WIDTHS)), draw(st.sampled_from(DTYPES))
    plain = _plain(draw, f, width)
    may_lack = {"weight", "bias", "z", "linear_bias", "scale_ub"} & set(f.op.arguments)
    if dict(plain).get("gemma"):
        may_lack.discard("weight")
    if "residual" in f.op.arguments and not f.needs_residual:
        may_lack.add("residual")
    absent = draw(st.sets(st.sampled_from(sorted(may_lack)))) if may_lack else ()
    relations = [APART, APART, APART]
    if (f.pair == ("input", "out") and f.op.kind == "rms") or (f.pair and "residual" in f.pair):
        relations += [SIDE_BY_SIDE, SAME, OVERLAPPING]
    if f.written and f.op.kind == "rms":
        relations.append(INTO_PARAMETERS)
    return Step(
        function=f.name,
        rows=draw(st.sampled_from((None, *ROWS, *ROWS))),
        inner=draw(st.sampled_from((*INNER[:1], *INNER))),
        width=width,
        dtype=dtype,
        weight_dtype=draw(st.sampled_from((dtype, torch.float32))),
        residual_dtype=draw(st.sampled_from((dtype, dtype, torch.float32))),
        out_dtype=draw(st.sampled_from(tuple(QMAX))) if f.op.kind == "quant" else dtype,
        absent=frozenset(absent),
        layouts=(
            draw(st.sampled_from(tuple(READABLE))),
            draw(st.sampled_from(tuple(READABLE))),
            draw(st.sampled_from((*WRITABLE, *READABLE))),
        ),
        offset=draw(st.sampled_from(OFFSETS)),
        shift=draw(st.sampled_from((1, 8, 32, -1))),
        relation=draw(st.sampled_from(relations)),
        mode=draw(st.sampled_from(MODES)),
        plain=plain,
        seed=draw(st.integers(0, 7)),
    )


def first(t: Tensor | tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
    """What a function returned, as a tuple."""
    return (t,) if isinstance(t, Tensor) else tuple(t or ())
