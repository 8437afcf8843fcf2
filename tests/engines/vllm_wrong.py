"""The vLLM child with norms that are wrong on purpose: python vllm_wrong.py scale|eps and the child's arguments.

What compares stock and patched must notice: a weight scaled by 1.01 and an eps ten times larger are bugs.
"""

import sys
from typing import Any

from norm_plugin import functions
from norm_plugin.verify import vllm_child


def wrong(kind: str, original: Any) -> Any:
    """A norm of (x, ..., eps, ...): its weight or its eps is not what was asked for."""

    def norm(op: Any, tensors: tuple[Any, ...], rest: tuple[Any, ...], *more: Any) -> Any:
        if kind == "eps":
            return original(op, tensors, (10 * rest[0], *rest[1:]), *more)
        place = op.arguments.index("weight")
        return original(op, (*tensors[:place], tensors[place] * 1.01, *tensors[place + 1 :]), rest, *more)

    return norm


if __name__ == "__main__":
    functions._call = wrong(sys.argv.pop(1), functions._call)  # type: ignore[assignment]
    vllm_child.main()
