"""Which numerics each library's kernels have: the share of elements whose bits differ from ours under each of them.

    PYTHONPATH=<the libraries>:. python -m benchmarks.numerics [--json FILE]
    python -m benchmarks.numerics --table FILE        the table of docs/numerics.md

Two kernels of the same numerics differ in one element of many thousands, where their sums, added up in another order,
lie on two sides of a tie; another rounding somewhere changes a tenth of all elements. Needs a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import norm_plugin
from benchmarks import records
from norm_plugin import settings
from norm_plugin.bench.buffers import EPS, Buffers, Function
from norm_plugin.bench.grid import Point
from norm_plugin.bench.libraries import COMPILED, LIBRARIES
from norm_plugin.bench.peers import attempt, loaded
from norm_plugin.numerics import GATED_NUMERICS, LAYER_NUMERICS, NUMERICS

WIDTHS = (128, 2048, 4096, 5120)
ROWS = 512


#: By op: the numerics that there are, and ours under one of them, on the buffers that its parameters are named after.
OURS: dict[str, tuple[Any, Function]] = {
    "rms": (NUMERICS, lambda x, w, how: norm_plugin.rmsnorm(x, w, EPS, numerics=how)),
    "add": (
        NUMERICS,
        lambda x_copy, r_copy, w, how: norm_plugin.fused_add_rmsnorm(x_copy, r_copy, w, EPS, numerics=how),
    ),
    "gemma": (NUMERICS, lambda x, w, how: norm_plugin.gemma_rmsnorm(x, w, EPS, numerics=how)),
    "gemma_add": (
        NUMERICS,
        lambda x_copy, r_copy, w, how: norm_plugin.gemma_fused_add_rmsnorm(x_copy, r_copy, w, EPS, numerics=how),
    ),
    "layer": (LAYER_NUMERICS, lambda x, w32, b32, how: norm_plugin.layernorm(x, w32, b32, EPS, numerics=how)),
    "gated": (GATED_NUMERICS, lambda x, w, z, how: norm_plugin.rmsnorm_fn(x, w, None, z, EPS, numerics=how)),
    "gate_first": (
        GATED_NUMERICS,
        lambda x, w, z, how: norm_plugin.rmsnorm_fn(x, w, None, z, EPS, norm_before_gate=False, numerics=how),
    ),
}


def output(f: Callable[[], Any]) -> torch.Tensor:
    """The bits of what f returns, without what comes beside it."""
    found = f()
    first: torch.Tensor = found[0] if isinstance(found, (tuple, list)) else found
    return first.view(torch.int16).clone()


NAMES = {
    "rms": "RMSNorm", "add": "fused add", "gemma": "Gemma", "gemma_add": "Gemma, fused add", "layer": "LayerNorm",
    "gated": "gated, norm first", "gate_first": "gated, gate first",
}  # fmt: skip
FAR = 0.01  # another rounding in the middle changes more


def table(rows: list[dict[str, Any]]) -> str:
    """Of every kernel: the numerics that its bits have, at all widths, and how far the next one that differs is."""
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for row in rows:
        found.setdefault((row["op"], row["library"]), []).append(row["differ"])
    lines = ["| op | kernel | numerics | bits differ | under another |", "|---|---|---|---:|---|"]
    for (op, library), shares in sorted(found.items(), key=lambda item: list(NAMES).index(item[0][0])):
        most = {how: max(share[how] for share in shares) for how in shares[0]}
        best = min(most, key=lambda how: most[how])
        others = {how: min(share[how] for share in shares) for how in most if how != best}
        far = {how: share for how, share in others.items() if share > FAR}
        nearest = min(far, key=lambda how: far[how], default="")
        is_one = most[best] < FAR
        lines.append(
            f"| {NAMES[op]} | {library} | {best if is_one else 'none of ours'} | {most[best]:.2g} | "
            f"{f'{far[nearest]:.0%}, {nearest}' if nearest else ''} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = records.parser(__doc__, "numerics")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print what a run found")
    options = parser.parse_args()
    if options.table:
        print(table(records.read(options.table)))
        return
    rows: list[dict[str, Any]] = []
    for library in LIBRARIES:
        functions, why = loaded(library)
        for op in [op for op in library.ops if op in OURS and library.name != COMPILED]:
            numerics, ours = OURS[op]
            for width in WIDTHS:
                row: dict[str, Any] = {"library": library.name, "op": op, "width": width}
                torch.manual_seed(width)
                buffers = Buffers(Point("small", op, ROWS, width))
                theirs, failed = attempt(partial(output, buffers.call(functions[op]))) if functions else (None, why)
                if theirs is None:
                    rows.append(row | {"failed": failed})
                    break
                differ = {}
                for how in numerics:
                    with settings.override(backend="triton", strict=True):
                        mine, failed = attempt(partial(output, buffers.call(partial(ours, how=how))))
                    differ[how] = failed if mine is None else (mine != theirs).float().mean().item()
                rows.append(row | {"differ": differ})
            shown = {r["width"]: r.get("differ") or r.get("failed") for r in rows if r["op"] == op}
            print(f"{library.name:26} {op:10}", *(f"\n    {w}: {d}" for w, d in shown.items()), flush=True)
    records.write(options.json, rows, dtype="bfloat16", rows=ROWS)


if __name__ == "__main__":
    main()
