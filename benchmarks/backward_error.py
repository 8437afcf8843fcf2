#!/usr/bin/env python3
"""How far outputs and gradients are from fp64: ours, Liger's, Quack's, FLA's and torch's, on the same inputs.

    PYTHONPATH=<the peers>:. python -m benchmarks.backward_error [--json FILE] [--seconds 400]

The truth is autograd through the formula in fp64 on the same values, with nothing rounded on the way: of a fused add,
the sum neither. Errors of tensors of rows are in ulps of the row's largest value, and a row is a sample: its mean error
and its largest. The gradients of weights and biases are in ulps of the largest of all, and a column is a sample. What
somebody returns in another dtype than that of its tensor is cast to that first.

Ours is "worse" than a peer's where the difference of both errors, averaged over the samples, is above what it may be by
chance: CHANCE standard errors, as its spread over the samples has them (one comparison in 30000). Where a tensor is
narrower than fp32, an error is the same for all but next to a tie, and up to what fp32 arithmetic moves is no
difference (norm_plugin/accuracy/compared.py, by which the tests hold ours against torch's, too). "better" likewise.

The exit code is 1 if anything is worse. `--device cpu` is a rehearsal on native ops, with torch's as the only peer.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import records
from norm_plugin import dispatch, settings
from norm_plugin.accuracy import compared, oracle, ulps
from norm_plugin.bench import backward
from norm_plugin.bench.families import EPS, Buffers
from norm_plugin.bench.grid import Point
from norm_plugin.bench.peers import attempt

LIBRARIES = {"Liger": backward.liger, "Quack": backward.quack, "FLA": backward.fla, "torch": backward.functional}
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
    leaves = [t.detach().double().requires_grad_() for t in backward.tensors(op, s)]
    with torch.enable_grad():
        found = OPS[op][1](*leaves)
    outputs = list(found) if isinstance(found, tuple) else [found]
    grads = [s.dy.double(), s.dr.double()][: len(outputs)]
    return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, leaves, grads)]


def measure(op: str, s: Typed, libraries: dict[str, dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """(a row for each tensor, library -> why it is not in them)."""
    names, truth = OPS[op][0], true_values(op, s)
    left: dict[str, str] = {}

    def of(make: Callable[[Buffers], Callable[[], Any]]) -> list[Errors]:
        made = make(s)()
        assert len(made) == len(truth), f"{len(made)} results instead of {len(truth)}"
        typed = (t.to(s.of_weights if name in OF_WEIGHTS else s.dtype) for name, t in zip(names, made, strict=True))
        return [errors(*pair) for pair in zip(typed, truth, strict=True)]

    ours = of(backward.OURS[op])
    rows = [
        {"tensor": name, "norm_plugin": {"rms": e.rms, "max": e.max, "ulps": [float(e.mean.mean()),
         float(e.largest.mean())]}} for name, e in zip(names, ours, strict=True)
    ]  # fmt: skip
    for name, makes in libraries.items():
        if op not in makes:
            continue
        found, why = attempt(partial(of, makes[op]))
        if why:
            left[name] = why
            continue
        for row, mine, theirs in zip(rows, ours, found, strict=True):
            dtype = s.of_weights if row["tensor"] in OF_WEIGHTS else s.dtype
            row[name] = {
                "rms": theirs.rms, "max": theirs.max,
                "ulps": [float(theirs.mean.mean()), float(theirs.largest.mean())],
                "ours_is": [verdict(mine.mean, theirs.mean, dtype), verdict(mine.largest, theirs.largest, dtype)],
            }  # fmt: skip
    return rows, left


def show(rows: list[dict[str, Any]]) -> None:
    """Over all shapes: how far ours is, and each peer's error as a multiple of ours."""
    print(
        f"{'op':16}{'x':10}{'weight':10}{'tensor':11}{'ours, rms':>11}{'max':>9}   peer's rms and max error over ours"
    )
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["op"], row["x"], row["w"], row["tensor"]), []).append(row)
    for (op, x, w, tensor), of in groups.items():
        mine = [row["norm_plugin"] for row in of]
        line = f"{op.removesuffix('_backward'):16}{x:10}{w:10}{tensor:11}"
        line += f"{max(m['rms'] for m in mine):11.2e}{max(m['max'] for m in mine):9.1e}  "
        for name in LIBRARIES:
            pairs = [(row[name], row["norm_plugin"]) for row in of if name in row]
            if pairs:
                ratios = [
                    sum(p[how] / m[how] if m[how] else 1.0 for p, m in pairs) / len(pairs) for how in ("rms", "max")
                ]
                worse = sum("worse" in p["ours_is"] for p, _ in pairs)
                line += f" {name} {ratios[0]:.3f} {ratios[1]:.2f}" + (f" (ours WORSE in {worse})" if worse else "")
        print(line)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write every row there")
    parser.add_argument("--seconds", type=float, default=400, help="no op is begun after that; default: %(default)s")
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS), help="only these")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: %(default)s")
    options = parser.parse_args()
    begin, cpu = time.monotonic(), options.device == "cpu"
    shapes = ((256, 96), (64, 1000)) if cpu else SHAPES
    libraries, left, rows, not_begun = {}, [], [], []
    for name, load in LIBRARIES.items():
        if cpu and name != "torch":
            continue
        libraries[name], why = attempt(load)
        if why:
            del libraries[name]
            left.append({"peer": name, "where": "", "reason": why})
    with settings.override(backend="native" if cpu else "triton", strict=True):
        for op in options.ops:
            for dtype, of_weights in DTYPES:
                for m, n in shapes:
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
    show(rows)
    worse = [
        f"{row['op']} {row['rows']} x {row['width']} {row['x']}, weights {row['w']}: {row['tensor']} {what} "
        f"{row['norm_plugin']['ulps'][i]:.5f} ulps, {name} {row[name]['ulps'][i]:.5f}"
        for row in rows
        for name in libraries
        if name in row
        for i, what in enumerate(("mean", "max"))
        if row[name]["ours_is"][i] == "worse"
    ]
    compared = sum(len(row[name]["ours_is"]) for row in rows for name in libraries if name in row)
    better = sum(row[name]["ours_is"].count("better") for row in rows for name in libraries if name in row)
    if options.json:
        about = {"rule": __doc__, "backends": backends, "worse": worse, "left_out": left, "not_begun": not_begun}
        records.write(options.json, rows, **about)
    print("\n".join(["ran:", *backends]))
    for entry in left:
        print("left out:", entry["peer"], entry["where"], entry["reason"])
    for line in worse:
        print("WORSE", line)
    print(f"{compared} comparisons: ours better in {better}, worse in {len(worse)}, alike in the rest; "
          f"not begun: {len(not_begun)}")  # fmt: skip
    return 1 if worse or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
