"""Which implementation runs a layer: the dispatch routes of inputs like its own."""

from __future__ import annotations

from typing import Any

from norm_plugin import dispatch
from norm_plugin.dispatch import Route

#: The dtype, width and strides of an input.
Input = tuple[str, int, tuple[int, ...]]

#: Ops that write their arguments, and the same ops with new outputs, which run where a caller keeps its arguments.
WITH_NEW_OUTPUTS = {"fused_add_rmsnorm": "add_rmsnorm"}


def find(op: str, inputs: list[Input]) -> list[dict[str, str]]:
    """The backend, the reason for it, numerics and launch configuration; several entries if the inputs differ."""
    found: list[dict[str, str]] = []
    for route in dispatch.routes():
        if route.op.name in (op, WITH_NEW_OUTPUTS.get(op)) and _input(route) in inputs:
            entry = {
                "backend": route.backend,
                "because": route.reason,
                "numerics": _numerics(route),
                "configuration": _configuration(route),
            }
            if entry not in found:
                found.append(entry)
    return found


def _input(route: Route) -> Input:
    dtype, shape, strides, _ = route.signature[1 + route.op.x]
    return str(dtype).removeprefix("torch."), shape[-1], tuple(strides)


def _numerics(route: Route) -> str:
    given = dict(zip(route.op.arguments, route.signature[1:], strict=True))
    return f"{given.get('numerics', 'fp32')}{', 1 + w' if given.get('gemma') else ''}"


def _configuration(route: Route) -> str:
    """How the kernel of the norm is launched, which is the first that a route launches."""
    if route.bound is None or not route.bound.launches:
        return ""
    launch: Any = route.bound.launches[0]
    words = [f"{launch.warps} warps"]
    config = getattr(launch, "config", None)
    if config is not None:
        words.append(f"{config.rows} rows a program")
        words.append(f"{config.chunks} x {config.block} columns")
    if launch.pdl:
        words.append("PDL")
    return ", ".join(words)
