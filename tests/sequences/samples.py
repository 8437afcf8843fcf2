"""Calls for threads: each with its own tensors, and the bits that a single thread gets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from norm_plugin import settings
from tests.sequences.calls import APART, FUNCTIONS, Arguments, Function, Step, first
from tests.sequences.placing import Placed, completed, place

Bits = tuple[Tensor, ...]


@dataclass
class Sample:
    """One call, the ops that it counts, and its results natively and on Triton."""

    f: Function
    placed: Placed
    gradients: bool
    native: Bits = ()
    triton: Bits = ()

    @property
    def ops(self) -> tuple[str, ...]:
        name = self.f.op.name
        return (name, f"{'rmsnorm' if name == 'add_rmsnorm' else name}_backward") if self.gradients else (name,)

    def right(self, found: Bits) -> bool:
        """Whether each tensor is the native or Triton's result. (Flags may change between a call and its gradients.)"""
        pairs = zip(found, self.native, self.triton, strict=True)
        return all(torch.equal(one, native) or torch.equal(one, triton) for one, native, triton in pairs)

    def arguments(self) -> Arguments:
        """New tensors with the strides of the sample."""
        return {key: _copied(value) if isinstance(value, Tensor) else value for key, value in self.placed.a.items()}

    def run(self) -> Bits:
        """Makes the call. Returns the bits of its outputs, of what it writes, and of its gradients."""
        a = self.arguments()
        if not self.gradients:
            returned = first(self.f.call(a))
            return tuple(_bits(t) for t in (*returned, *(a[name] for name in self.placed.written)))
        leaf = a[self.f.by_row[0]].requires_grad_()
        outs = first(self.f.call(a))
        found = torch.autograd.grad(outs, [leaf], [torch.ones_like(o) for o in outs])
        return tuple(_bits(t) for t in (*outs, *found))


def _copied(t: Tensor) -> Tensor:
    copy = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
    return copy.copy_(t)


def _bits(t: Tensor) -> Tensor:
    return t.detach().contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[t.itemsize])


def same(one: Bits, other: Bits) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


PLAIN: dict[str, Any] = {
    "eps": 1e-6, "numerics": "fp32", "gemma": False, "variance_size": None, "output_dtype": None, "group_size": 8,
    "norm_before_gate": True, "is_rms_norm": False, "activation": "silu", "enable_pdl": None,
    "quant_dtype": torch.int8,
}  # fmt: skip
BACKWARD = ("rmsnorm", "add_rmsnorm", "l2norm", "layernorm", "layernorm_fn")


def samples(*, kernels: Callable[[], Any]) -> list[Sample]:
    """Every function, in two layouts and with several numbers of rows, some through autograd. `kernels` is a context in
    which calls run on Triton."""
    made = []
    for number, f in enumerate(FUNCTIONS.values()):
        for layout in ("contiguous", "padded"):
            for rows in (1, 4):
                plain = dict(f.fixed) | {key: PLAIN[key] for key in f.op.arguments if key in PLAIN} | dict(f.fixed)
                dtype = (torch.float32, torch.bfloat16)[number % 2]
                out = torch.int8 if f.op.kind == "quant" else dtype
                step = Step(f.name, rows, (), 64, dtype, dtype, dtype, out, frozenset(), (layout,) * 3, 0, 1, APART,
                            "plain", tuple(plain.items()), number)  # fmt: skip
                for gradients in (False, True) if f.name in BACKWARD and rows > 1 else (False,):
                    made.append(Sample(f, place(completed(replace(step))), gradients))
    with settings.override(backend="native"):
        for sample in made:
            sample.native = sample.run()
    with kernels():
        for sample in made:
            sample.triton = sample.run()
    return made
