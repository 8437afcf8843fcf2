"""SGLang with --enable-deterministic-inference: patched has the same bits in every batch and in every process.

PYTHONPATH=<SGLang and what it needs>:. python -m benchmarks.deterministic sglang [--json FILE] ...
"""

from __future__ import annotations

from typing import Any

from benchmarks import engines, lab, models
from benchmarks.engines import ORDERS, UNEQUAL
from benchmarks.lab import SIDES, Lab
from norm_plugin.verify.comparison import compare


def measure(here: Lab, model: str, mode: str) -> dict[str, Any]:
    """Each side in every order and twice in the first, and patched once more in another process."""
    tokens, found, first = 24 if here.cuda else 4, dict[str, Any](), {}
    for side in SIDES:
        with here.engine(model, mode, side) as engine:
            first[side], *others = (engine.answers(UNEQUAL, tokens, order) for order in (*ORDERS, "given"))
            outcome = engine.end()
        found[side] = {order: first[side] == other for order, other in zip((*ORDERS[1:], "again"), others, strict=True)}
    with here.engine(model, mode, "patched") as engine:
        found["patched"]["another process"] = first["patched"] == engine.answers(UNEQUAL, tokens)
    apart = compare(first["stock"], first["patched"])
    between = {"max": apart.max, "mean": apart.mean, "diverged": apart.diverged}
    return {
        "same_bits": found,
        "stock_and_patched": between,
        "version": outcome.version,
        "calls": engines.calls(outcome),
    }


if __name__ == "__main__":
    options = lab.parser(__doc__, ["sglang"]).parse_args()
    options.modes = ["deterministic"]
    Lab("deterministic", options).run(measure, models.TINY, at_once=4)
