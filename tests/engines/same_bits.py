"""The forward of an engine's patched layer and the trainer's own, bit for bit: what the tests of both engines share
with same_bits_on_gpu.py.

The trainer has `norm_plugin.layers` with the weights of the engine's layer and the numerics that the adapter chose for
it, and records gradients; the engine runs in inference mode. Both have to come through the ops that users have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from norm_plugin import dispatch
from norm_plugin.dispatch import Route
from norm_plugin.engines import call_counts

#: Numerics that have other bits than these, in an output that is narrower than fp32. A LayerNorm is rounded once in
#: either of its numerics.
OTHER = {"fp32": "hf", "hf": "fp32", "vllm_c": "hf", "sgl_jit": "hf", "torch": "torch_hf", "torch_hf": "torch"}


@dataclass(frozen=True)
class Case:
    """One call of an engine's layer, counted as `op`, and how a trainer makes its own of the same: with numerics."""

    name: str
    op: str
    engine: Callable[..., Any]
    trainer: Callable[[str], nn.Module]
    weights: dict[str, Tensor]
    inputs: tuple[Tensor, ...]


@dataclass
class Found:
    """What became of a case; `wrong` says what must not be."""

    name: str
    dtype: str
    numerics: str = ""
    backends: list[str] = field(default_factory=list)
    other_numerics_differ: bool | None = None
    wrong: list[str] = field(default_factory=list)


def listed(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, (tuple, list)) else [result]


def route_of_one_call() -> Route:
    """The only op that has run; the call_counts and dispatch both count it once."""
    (route,) = dispatch.routes()
    assert route.calls == 1
    return route


def numerics_of(route: Route) -> str:
    return str(route.signature[1 + route.op.arguments.index("numerics")])


def trained(case: Case, numerics: str) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The outputs of the trainer's layer, with gradients recorded, and what it is differentiated by."""
    layer = case.trainer(numerics)
    for name, value in case.weights.items():
        getattr(layer, name).data = value.detach().clone()
    leaves = {f"input {place}": t.detach().clone().requires_grad_() for place, t in enumerate(case.inputs)}
    outputs = listed(layer(*leaves.values()))
    return outputs, {**leaves, **dict(layer.named_parameters())}


def compare(case: Case) -> Found:
    """Run a case; nothing is raised but by what runs."""
    found = Found(case.name, str(case.inputs[0].dtype).removeprefix("torch."))
    call_counts.reset()
    dispatch.reset()
    with torch.inference_mode():
        served = listed(case.engine(*(t.clone() for t in case.inputs)))
    if [(row.op, row.reason, row.calls) for row in call_counts.rows()] != [(case.op, "", 1)]:
        found.wrong.append(f"the engine's layer was not taken: {call_counts.rows()}")
        return found
    route = route_of_one_call()
    found.numerics, found.backends = numerics_of(route), [route.backend]
    with torch.inference_mode(False), torch.enable_grad():
        dispatch.reset()
        outputs, leaves = trained(case, found.numerics)
        found.backends.append(route_of_one_call().backend)
        if len(outputs) != len(served):
            found.wrong.append(f"{len(served)} outputs in the engine, {len(outputs)} in the trainer")
        for place, pair in enumerate(zip(outputs, served, strict=False)):
            found.wrong += [f"output {place}: {why}" for why in difference(*pair)]
        grads = [torch.randn_like(out) for out in outputs]
        for name, grad in zip(leaves, torch.autograd.grad(outputs, [*leaves.values()], grads), strict=True):
            if not grad.isfinite().all() or not grad.any():
                found.wrong.append(f"the gradient of {name} is not finite, or zero")
        if case.inputs[0].dtype != torch.float32 and case.op != "layernorm" and "weight" in leaves:
            other = trained(case, OTHER[found.numerics])[0][0]
            found.other_numerics_differ = bool(difference(other, served[0]))
    if len(set(found.backends)) != 1:
        found.wrong.append(f"the engine ran on {found.backends[0]}, the trainer on {found.backends[1]}")
    if found.other_numerics_differ is False:
        found.wrong.append(f"{OTHER[found.numerics]} has the same bits: these inputs show nothing")
    return found


def difference(trained: Tensor, served: Tensor) -> list[str]:
    """What is not equal, in words."""
    if not trained.requires_grad:
        return ["the trainer's requires no gradient"]
    if trained.dtype != served.dtype or trained.shape != served.shape:
        return [f"{trained.dtype} {list(trained.shape)}, and {served.dtype} {list(served.shape)} in the engine"]
    if torch.equal(trained, served):
        return []
    apart = int((trained != served).sum())
    return [f"{apart} of {served.numel()} elements differ"]
