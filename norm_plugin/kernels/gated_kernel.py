"""The gated norm kernel: LayerNorm or RMSNorm of each group of a row, with the gate before or after it. Also plain
LayerNorm, and RMSNorm of rows whose parts lie on several ranks."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from norm_plugin.kernels.common import (
    DROP,
    KEEP,
    add_pairs,
    by_column,
    cast,
    expect,
    gate,
    mask_of,
    mean_of,
    read,
    read_raw,
    read_with_row,
    release_consumer,
    row_start,
    wait_for_producer,
)
from norm_plugin.kernels.constants import constants


@constants
class Recipe(NamedTuple):
    """What the kernel computes for each of `groups` groups of a row. `qmax`: the largest value of a quantised output.
    `full_width`: the columns of a whole row, if its parts lie on several ranks. `fp8_unit`: the GPU converts to fp8."""

    groups: int
    rms: bool
    gate_first: bool
    sigmoid: bool
    round_before_weight: bool
    round_before_quant: bool
    qmax: float
    full_width: int
    fp8_unit: bool


@triton.jit
def load_gated(X, Z, x_at, z_at, cols, mask, recipe: tl.constexpr, STAY: tl.constexpr = 0):
    """One chunk of x in fp32, multiplied by the gate if the gate comes first."""
    h = read(X + x_at + cols, mask, STAY)
    if Z is not None and recipe.gate_first:
        h = h * gate(read(Z + z_at + cols, mask, STAY), recipe.sigmoid)
    return h


@triton.jit
def finish(Y, xhat, w, b, z, inverse, dtype: tl.constexpr, recipe: tl.constexpr):
    """xhat * w + b, then the gate z if it comes last, the quantisation if there is a scale, and the rounding."""
    y = xhat
    if recipe.round_before_weight:
        y = y.to(dtype).to(tl.float32)
    if w is not None:
        y = y * w.to(tl.float32)
    if b is not None:
        y = y + b.to(tl.float32)
    if recipe.round_before_weight:
        y = y.to(dtype).to(tl.float32)
    if z is not None:
        y = y * gate(z.to(tl.float32), recipe.sigmoid)
    if inverse is not None:
        if recipe.round_before_quant:
            y = y.to(dtype).to(tl.float32)
        y = cast(y * inverse, recipe.qmax, Y.dtype.element_ty, recipe.fp8_unit)
    return y.to(Y.dtype.element_ty)


@triton.jit(do_not_specialize=["M", "n1", "n2", "x0", "x1", "x2", "z0", "z1", "z2", "y0", "y1", "y2"])
def gated_kernel(
    X, Z, W, B, Y, S, SUMS, M, n1, n2, x0, x1, x2, z0, z1, z2, y0, y1, y2, eps,
    tile: tl.constexpr, recipe: tl.constexpr,
):  # fmt: skip
    """Y = norm of M groups in all. S is the scale of a quantised Y. For rows in parts, SUMS has the sums of squares of
    whole rows; without a Y, the kernel writes those of its parts to SUMS."""
    index = tl.program_id(0) * tile.rows + tl.arange(0, tile.rows)[:, None]
    in_batch = index < M
    index = tl.minimum(index, M - 1)
    row = index // recipe.groups
    group = index % recipe.groups
    w_at = group * tile.n
    x_at = row_start(row, n1, n2, x0, x1, x2, tile) + w_at
    y_at = row_start(row, n1, n2, y0, y1, y2, tile) + w_at if Y is not None else x_at
    z_at = row_start(row, n1, n2, z0, z1, z2, tile) + w_at if Z is not None else x_at
    lane = tl.arange(0, tile.block)[None, :]
    dtype: tl.constexpr = X.dtype.element_ty
    expect(W, w_at, tl.program_id(0) * tile.rows < recipe.groups, tile)
    expect(B, w_at, tl.program_id(0) * tile.rows < recipe.groups, tile)
    wait_for_producer(tile.pdl, tile.late)

    sums = tl.zeros([tile.rows, tile.block], tl.float32)
    squares = tl.zeros([tile.rows, tile.block], tl.float32)
    GATE_LAST: tl.constexpr = Z is not None and not recipe.gate_first
    SUMMED: tl.constexpr = SUMS is None or Y is None  # otherwise the sums are given
    AGAIN: tl.constexpr = tile.chunks - tile.held  # whole chunks, read a second time for the output
    mean = tl.zeros([tile.rows, 1], tl.float32)
    if AGAIN > 0 and SUMMED:
        if not recipe.rms:
            # Any value near the mean serves as a first mean; that of the first chunk is within sqrt(chunks) deviations.
            mean = tl.sum(load_gated(X, Z, x_at, z_at, lane, in_batch, recipe), axis=1, keep_dims=True)
            mean = mean * (1.0 / tile.block)
        for start in tl.range(0, AGAIN, tile.unroll):
            for u in tl.static_range(tile.unroll):
                cols = (start + u) * tile.block + lane
                mask = (cols < AGAIN * tile.block) & in_batch
                h = load_gated(X, Z, x_at, z_at, cols, mask, recipe, KEEP)
                off = tl.where(cols < AGAIN * tile.block, h - mean, 0.0)
                sums += off
                squares += off * off
    variance = mean_of(tl.load(SUMS + row), recipe.full_width) if not SUMMED else mean
    held = ()
    gates = ()
    for c in tl.static_range(AGAIN, tile.chunks):
        cols = c * tile.block + lane
        mask = mask_of(c, lane, in_batch, tile.rows > 1, tile)
        if Z is not None and recipe.gate_first:
            held += (load_gated(X, Z, x_at, z_at, cols, mask, recipe),)
        else:
            held += (read_raw(X + x_at + cols, mask),)
        if Y is None:  # at once: nothing else needs the row
            squares += held[c - AGAIN].to(tl.float32) * held[c - AGAIN].to(tl.float32)
        if GATE_LAST:  # read with x, not after the reduction: one memory latency instead of two
            gates += (read_raw(Z + z_at + cols, mask),)
    weights = read_with_row(W, w_at, lane, tile)
    biases = read_with_row(B, w_at, lane, tile)
    given_scale = tl.load(S).to(tl.float32) if S is not None else 0.0
    release_consumer(tile.pdl, tile.late)
    if AGAIN == 0 and not recipe.rms:
        for c in tl.static_range(tile.chunks):
            sums += held[c].to(tl.float32)
        mean = mean_of(tl.sum(sums, axis=1, keep_dims=True), tile.n)
        sums = tl.zeros([tile.rows, tile.block], tl.float32)
    if SUMMED and Y is not None:
        for c in tl.static_range(AGAIN, tile.chunks):
            off = held[c - AGAIN].to(tl.float32)
            if not recipe.rms:
                off = off - mean
                if c * tile.block + tile.block > tile.n:
                    off = tl.where(c * tile.block + lane < tile.n, off, 0.0)
                sums += off
            squares += off * off
    if Y is None:
        tl.store(SUMS + row, tl.sum(squares, axis=1, keep_dims=True), mask=in_batch)
    else:
        left = tl.zeros([tile.rows, 1], tl.float32)
        if SUMMED and recipe.rms:
            variance = mean_of(tl.sum(squares, axis=1, keep_dims=True), tile.n)
        elif SUMMED:  # the same reduction also corrects the first mean
            left, variance = tl.reduce((sums, squares), 1, add_pairs, keep_dims=True)
            left = mean_of(left, tile.n)
            variance = mean_of(variance, tile.n) - left * left
        rstd = tl.rsqrt(variance + eps)
        tensor_scale = tl.zeros([tile.rows, 1], tl.float32) + given_scale
        inverse = tl.div_rn(tl.full([tile.rows, 1], 1.0, tl.float32), tensor_scale) if S is not None else None
        for c in tl.static_range(AGAIN, tile.chunks):
            cols = c * tile.block + lane
            mask = mask_of(c, lane, in_batch, tile.rows > 1, tile)
            h = held[c - AGAIN].to(tl.float32)
            xhat = h * rstd if recipe.rms else tl.fma(h - mean, rstd, -left * rstd)
            w = by_column(W, w_at, weights, c, lane, tile)
            b = by_column(B, w_at, biases, c, lane, tile)
            z = gates[c - AGAIN] if GATE_LAST else None
            y = finish(Y, xhat, w, b, z, inverse, dtype, recipe)
            tl.store(Y + y_at + cols, y, mask=mask)
        if AGAIN > 0:  # from the end, because the L2 cache still holds what was read last
            for back in tl.range(0, AGAIN, tile.unroll):
                for u in tl.static_range(tile.unroll):
                    cols = ((AGAIN - 1) // tile.unroll * tile.unroll - back + u) * tile.block + lane
                    whole = cols < AGAIN * tile.block
                    inside = whole & in_batch
                    h = load_gated(X, Z, x_at, z_at, cols, inside, recipe, DROP)
                    xhat = h * rstd if recipe.rms else tl.fma(h - mean, rstd, -left * rstd)
                    weight = read(W + w_at + cols, whole, KEEP) if W is not None else None
                    bias = read(B + w_at + cols, whole, KEEP) if B is not None else None
                    gating = read(Z + z_at + cols, inside, DROP) if GATE_LAST else None
                    y = finish(Y, xhat, weight, bias, gating, inverse, dtype, recipe)
                    tl.store(Y + y_at + cols, y, mask=inside)
