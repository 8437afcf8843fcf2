"""A real engine on a GPU, stock against patched: the same output, by the rule of `norm-plugin verify`.

    PYTHONPATH=<the engine and what it needs>:. python -m benchmarks.same_output vllm|sglang [--json FILE] ...

The noise floor is stock against itself, with the requests in reverse order and one by one. Nothing has to be installed.
Nothing else may run on the GPU meanwhile. `--device cpu --models tiny:llama` is a rehearsal.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from benchmarks import engines, lab, models
from benchmarks.engines import ORDERS, UNEQUAL
from benchmarks.lab import Lab
from norm_plugin.verify.verdict import judged


def measure(here: Lab, model: str, mode: str) -> dict[str, Any]:
    """Stock in three orders, then patched in the first."""
    tokens = 24 if here.cuda else 4
    with here.engine(model, mode, "stock") as engine:
        given, *others = (engine.answers(UNEQUAL, tokens, order) for order in ORDERS)
        stock = engine.end()
    with here.engine(model, mode, "patched") as engine:
        ours = engine.answers(UNEQUAL, tokens)
        patched = engine.end()
    found = judged(  # each of the other orders beside the first, and patched as often
        replace(stock, answers=given * len(others)),
        replace(stock, answers=[answer for order in others for answer in order]),
        replace(patched, answers=ours * len(others)),
    ).as_json()
    for name in ("floor", "patched"):
        del found[name]["prompts"]  # position by position
    return {**found, "model": model, "version": patched.version, "calls": engines.calls(patched)}


def main() -> None:
    options = lab.parser(__doc__).parse_args()
    default = {"vllm": models.WIDTHS, "sglang": models.TINY}[options.engine]
    Lab("same_output", options).run(measure, default, at_once=3)


if __name__ == "__main__":
    main()
