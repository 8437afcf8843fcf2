"""How far outputs and gradients are from fp64: ours, Liger's, Quack's, FLA's and torch's, on the same inputs.

    PYTHONPATH=<the peers>:. python -m benchmarks.backward_error [--json FILE] [--seconds 400]

The truth is autograd through the formula in fp64 on the same values, with nothing rounded on the way, not even the sum
of a fused add. In tensors of rows an error is in ulps of its row's largest value, and each row is a sample, of its mean
and its largest error. In gradients of weights and biases an error is in ulps of the largest value of all, and each
column is a sample. A result in another dtype than its tensor's is cast to that first.

Ours is "worse" than a peer's where the mean over the samples of (our error - theirs) is more than chance allows: CHANCE
of its standard errors, which one comparison in 30000 exceeds. In tensors narrower than fp32, what fp32 arithmetic can
move is allowed, too (norm_plugin/accuracy/compared.py, which the tests use as well). "better" likewise.

The exit code is 1 if anything is worse. `--device cpu` is a rehearsal on native ops, with torch's as the only peer.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import records
from norm_plugin import dispatch, settings
from norm_plugin.accuracy import compared, oracle, ulps
from norm_plugin.bench import backward
from norm_plugin.bench.buffers import EPS, Buffers, Function
from norm_plugin.bench.grid import Point
from norm_plugin.bench.libraries import functional
from norm_plugin.bench.our_calls import OURS
from norm_plugin.bench.peers import attempt
from norm_plugin.bench.tables import table

LIBRARIES = {"Liger": backward.liger, "Quack": backward.quack, "FLA": backward.fla, "torch": functional}
SHAPES = ((4096, 1024), (8192, 2880), (2048, 4096), (4096, 8192), (1024, 16384), (512, 65536))
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = ((BF16, BF16), (BF16, FP32), (FP16, FP16), (FP32, FP32))  # of x, and of the weights

OF_WEIGHTS = ("dw", "db")

#: Op -> the names of what a call returns, and its formula.
OPS: dict[str, tuple[tuple[str, ...], Callable[..., Any]]] = {
    "rms_backward": (("out", "dx", "dw"), lambda x, w: oracle.rmsnorm(x, w, EPS)),
    "gemma_backward": (("out", "dx", "dw"), lambda x, w: oracle.rmsnorm(x, w, EPS, gemma=True)),
    "add_backward": (("out", "sum", "dx", "dresidual", "dw"), lambda x, r, w: oracle.add_rmsnorm(x, r, w, EPS)),
    "layer_backward": (("out", "dx", "dw", "db"), lambda x, w, b: oracle.layernorm(x, w, b, EPS)),
    "gated_backward": (
        ("out", "dx", "dw", "dz"),
        lambda x, w, z: oracle.gated_norm(x, w, None, z, EPS, is_rms_norm=True),
    ),
    "gate_first_backward": (
        ("out", "dx", "dw", "dz"),
        lambda x, w, z: oracle.gated_norm(x, w, None, z, EPS, None, False, True),
    ),
}


class Typed(Buffers):
    """Buffers of other dtypes than those that are timed."""

    def __init__(self, point: Point, device: str, dtype: torch.dtype, of_weights: torch.dtype) -> None:
        super().__init__(point, device)
        self.dtype, self.of_weights = dtype, of_weights

    def normal(self, *shape: int) -> Tensor:
        dtype = self.of_weights if len(shape) == 1 else self.dtype
        return torch.randn(*shape, device=self.device, dtype=torch.float32).to(dtype)


class Errors(NamedTuple):
    """Of one tensor: by sample in ulps, and relative to the root mean square of the truth."""

    mean: Tensor
    largest: Tensor
    rms: float
    max: float

    def kept(self) -> dict[str, Any]:
        """As it is written down; of the samples, their means."""
        return {"rms": self.rms, "max": self.max, "ulps": [float(self.mean.mean()), float(self.largest.mean())]}


def errors(found: Tensor, truth: Tensor) -> Errors:
    off = (found.double() - truth).abs()
    scale = truth.square().mean().sqrt()
    relative = float(off.square().mean().sqrt() / scale), float(off.max() / scale)
    if truth.dim() > 1:
        return Errors(*compared.row_errors(found, truth), *relative)
    in_ulps = off / ulps.size(truth.abs().max(), found.dtype)
    return Errors(in_ulps, in_ulps, *relative)


def verdict(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> str:
    """ "worse", "better" or "", as the head of this file says."""
    difference = ours - theirs
    allowed, mean = compared.allowed(difference, dtype), float(difference.mean())
    return "worse" if not mean <= allowed else "better" if mean < -allowed else ""


def true_values(op: str, s: Buffers) -> list[Tensor]:
    leaves = [t.detach().double().requires_grad_() for t in s.taken(OURS[op]).values()]
    with torch.enable_grad():
        found = OPS[op][1](*leaves)
    outputs = list(found) if isinstance(found, tuple) else [found]
    grads = [s.dy.double(), s.dr.double()][: len(outputs)]
    return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, leaves, grads)]


def measure(op: str, s: Typed, libraries: dict[str, dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """(a row for each tensor, library -> why it is not in them)."""
    names, truth = OPS[op][0], true_values(op, s)
    left: dict[str, str] = {}

    def of(function: Function) -> list[Errors]:
        made = backward.trained(function, s)()
        assert len(made) == len(truth), f"{len(made)} results instead of {len(truth)}"
        typed = (t.to(s.of_weights if name in OF_WEIGHTS else s.dtype) for name, t in zip(names, made, strict=True))
        return [errors(*pair) for pair in zip(typed, truth, strict=True)]

    ours = of(OURS[op])
    rows = [{"tensor": name, "norm_plugin": mine.kept()} for name, mine in zip(names, ours, strict=True)]
    for name, functions in libraries.items():
        if op not in functions:
            continue
        found, why = attempt(partial(of, functions[op]))
        if why:
            left[name] = why
            continue
        for row, mine, theirs in zip(rows, ours, found, strict=True):
            dtype = s.of_weights if row["tensor"] in OF_WEIGHTS else s.dtype
            is_ours = [verdict(mine.mean, theirs.mean, dtype), verdict(mine.largest, theirs.largest, dtype)]
            row[name] = {**theirs.kept(), "ours_is": is_ours}
    return rows, left


def shown(rows: list[dict[str, Any]]) -> str:
    """Over all shapes: how far ours is, and each peer's error as a multiple of ours."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["op"], row["x"], row["w"], row["tensor"]), []).append(row)
    lines = []
    for group, of in groups.items():
        line = [*group, *(f"{max(row['norm_plugin'][how] for row in of):.2e}" for how in ("rms", "max"))]
        for name in LIBRARIES:
            pairs = [(row[name], row["norm_plugin"]) for row in of if name in row]
            means = [fmean(p[how] / m[how] if m[how] else 1.0 for p, m in pairs) for how in ("rms", "max") if pairs]
            line.append(" ".join(f"{mean:.3f}" for mean in means))
        lines.append(line)
    return table(
        ["op", "x", "weight", "tensor", "ours, rms", "max", *(f"{name}, rms max" for name in LIBRARIES)], lines
    )


def worse_lines(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each error of ours that is worse than a peer's."""
    return [
        f"{row['op']} {row['rows']} x {row['width']} {row['x']}, weights {row['w']}: {row['tensor']} {what} "
        f"{row['norm_plugin']['ulps'][i]:.5f} ulps, {name} {row[name]['ulps'][i]:.5f}"
        for row in rows
        for name in LIBRARIES
        if name in row
        for i, what in enumerate(("mean", "max"))
        if row[name]["ours_is"][i] == "worse"
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write every row there")
    parser.add_argument("--seconds", type=float, default=400, help="no op is begun after that; default: %(default)s")
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS), help="only these")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: %(default)s")
    options = parser.parse_args()
    begin, cpu = time.monotonic(), options.device == "cpu"
    libraries, left, rows, not_begun = {}, [], [], []
    for name, load in LIBRARIES.items() if not cpu else [("torch", functional)]:
        functions, why = attempt(load)
        if why:
            left.append({"peer": name, "where": "", "reason": why})
        else:
            libraries[name] = functions
    with settings.override(backend="native" if cpu else "triton", strict=True):
        for op, (dtype, of_weights), (m, n) in product(options.ops, DTYPES, ((256, 96), (64, 1000)) if cpu else SHAPES):
            where = {"op": op, "x": str(dtype)[6:], "w": str(of_weights)[6:], "rows": m, "width": n}
            if time.monotonic() - begin > options.seconds:
                not_begun.append(where)
                continue
            torch.manual_seed(n + m)
            s = Typed(Point("backward", op, m, n), options.device, dtype, of_weights)
            found, why_not = measure(op, s, libraries)
            rows += [{**where, **row} for row in found]
            left += [{"peer": name, "where": str(where), "reason": why} for name, why in why_not.items()]
        backends = sorted({f"{route.op.name} on {route.backend}" for route in dispatch.routes()})
    worse = worse_lines(rows)
    if options.json:
        about = {"rule": __doc__, "backends": backends, "worse": worse, "left_out": left, "not_begun": not_begun}
        records.write(options.json, rows, **about)
    print(shown(rows), "ran:", *backends, sep="\n")
    for entry in left:
        print("left out:", entry["peer"], entry["where"], entry["reason"])
    for line in worse:
        print("WORSE", line)
    verdicts = [one for row in rows for name in libraries if name in row for one in row[name]["ours_is"]]
    better = verdicts.count("better")
    print(f"{len(verdicts)} comparisons: ours better in {better}, worse in {len(worse)}; not begun: {len(not_begun)}")
    return 1 if worse or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
