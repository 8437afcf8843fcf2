"""The vLLM child with norms that are wrong on purpose: python vllm_wrong.py scale|eps|inside|alone and the child's
arguments.

What compares stock and patched must notice: a weight scaled by 1.01, an eps ten times larger (also where only compiled
code calls the op, "inside"), and a rank that leaves out what the others have of a row are bugs. vLLM's own processes
import this file again.
"""

import os
import sys
from typing import Any

from norm_plugin import functions, split
from norm_plugin.engines import calls
from norm_plugin.native import layer
from norm_plugin.verify import vllm_child

KIND = "WRONG_NORM"


def wrong(kind: str, original: Any) -> Any:
    """call, with another weight or eps than was asked for."""

    def norm(op: Any, tensors: tuple[Any, ...], rest: tuple[Any, ...], **more: Any) -> Any:
        given = dict(zip(op.arguments, (*tensors, *rest), strict=False))
        if kind == "eps" and "eps" in given:
            given["eps"] *= 10
        if kind == "scale" and "weight" in given:
            given["weight"] = given["weight"] * 1.01
        values = tuple(given.values())
        return original(op, values[: len(tensors)], values[len(tensors) :], **more)

    return norm


def inside(original: Any) -> Any:
    """What our LayerNorm op runs, with another eps."""

    def norm(input: Any, weight: Any, bias: Any, eps: float) -> Any:
        return original(input, weight, bias, 10 * eps)

    return norm


def alone(original: Any) -> Any:
    """rmsnorm_of_part of rows that have no other parts."""

    def norm(x: Any, weight: Any, z: Any, eps: float, parts: int, all_reduce: Any, **how: Any) -> Any:
        return original(x, weight, z, eps, 1, lambda sums: sums, **how)

    return norm


if __name__ == "__main__":
    os.environ[KIND] = sys.argv.pop(1)

if os.environ[KIND] == "alone":
    split.rmsnorm_of_part = alone(split.rmsnorm_of_part)
elif os.environ[KIND] == "inside":
    layer.torch_layernorm = inside(layer.torch_layernorm)
else:
    for module in (functions, calls, split):
        module.call = wrong(os.environ[KIND], module.call)

if __name__ == "__main__":
    vllm_child.main()
