"""The RMSNorm kernel: plain, fused add, Gemma and l2 norm, each also with a quantised output."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from norm_plugin.kernels.common import (
    DROP,
    KEEP,
    by_column,
    cast,
    expect,
    larger,
    largest_of,
    mask_of,
    mean_of,
    quotient,
    read,
    read_raw,
    read_with_row,
    release_consumer,
    row_start,
    wait_for_producer,
)
from norm_plugin.kernels.constants import constants

#: The values of `quant`.
NO_QUANT, STATIC, PER_TOKEN, PER_BLOCK = 0, 1, 2, 3


@constants
class Recipe(NamedTuple):
    """What the kernel computes: the fields of a Numerics, and how the output is quantised (in blocks of `group`
    columns, to values up to `qmax`). `fp8_unit`: the GPU converts to fp8."""

    gemma: bool
    variance_of_rounded_sum: bool
    output_of_rounded_sum: bool
    round_before_weight: bool
    weight_before_scale: bool
    l2: bool
    quant: int
    group: int
    qmax: float
    min_scale: float
    fp8_unit: bool


@triton.jit
def sum_of(x, r):
    """(x + r, x + r rounded to r's dtype), both in fp32. Without a residual, x twice."""
    total = x.to(tl.float32)
    rounded = total
    if r is not None:
        total += r.to(tl.float32)
        rounded = total.to(r.dtype).to(tl.float32)
    return total, rounded


@triton.jit
def load_sum(X, R, x_at, r_at, cols, mask, STAY: tl.constexpr):
    """Reads one chunk and returns its `sum_of`."""
    x = read_raw(X + x_at + cols, mask, STAY)
    r = read_raw(R + r_at + cols, mask, STAY) if R is not None else None
    return sum_of(x, r)


@triton.jit
def scale(h, s, w, dtype: tl.constexpr, recipe: tl.constexpr):
    """h * s * w before its last rounding."""
    if w is None:
        y = h * s
    else:
        w = w.to(tl.float32)
        if recipe.gemma:
            w = w + 1.0
        if recipe.weight_before_scale:
            y = h * w * s
        elif recipe.round_before_weight:
            y = (h * s).to(dtype).to(tl.float32) * w
        else:
            y = h * s * w
    return y


@triton.jit
def to_quantise(h, s, w, dtype: tl.constexpr, recipe: tl.constexpr):
    """The value to quantise: h * s * w, rounded if the numerics round before the weight."""
    y = scale(h, s, w, dtype, recipe)
    return y.to(dtype).to(tl.float32) if recipe.round_before_weight and recipe.quant > 0 else y


@triton.jit
def store(Y, y_at, S, y, inverse, token_scale, cols, mask, rows, column, END: tl.constexpr, tile: tl.constexpr,
          recipe: tl.constexpr):  # fmt: skip
    """Rounds one chunk and writes it; with PER_BLOCK also its scales, up to column END."""
    out: tl.constexpr = Y.dtype.element_ty
    if recipe.quant == 0:
        y = y.to(out)
    elif recipe.quant == 1:
        y = cast(y * inverse, recipe.qmax, out, recipe.fp8_unit)
    elif recipe.quant == 2:
        y = y * inverse if out == tl.int8 else quotient(y, inverse, token_scale, recipe.fp8_unit)
        y = cast(y, recipe.qmax, out, recipe.fp8_unit)
    else:
        BLOCKS: tl.constexpr = tile.block // recipe.group
        blocks = tl.reshape(y, [tile.rows, BLOCKS, recipe.group])
        largest = largest_of(blocks, 2)
        scales = larger(tl.div_rn(largest, tl.full([tile.rows, BLOCKS, 1], recipe.qmax, tl.float32)), recipe.min_scale)
        inverses = tl.div_rn(tl.full([tile.rows, BLOCKS, 1], 1.0, tl.float32), scales)
        blocks = blocks * inverses if out == tl.int8 else quotient(blocks, inverses, scales, recipe.fp8_unit)
        y = tl.reshape(cast(blocks, recipe.qmax, out, recipe.fp8_unit), [tile.rows, tile.block])
        block = column // recipe.group + tl.arange(0, BLOCKS)[None, :]
        in_row = (block < END // recipe.group) & (rows[:, None] >= 0)
        place = S + rows[:, None].to(tl.int64) * (tile.n // recipe.group) + block
        tl.store(place, tl.reshape(scales, [tile.rows, BLOCKS]), mask=in_row)
    tl.store(Y + y_at + cols, y, mask=mask)


# Strides are not in tuples: Triton would make a constant of each 1, and another kernel for those that 16 divides.
@triton.jit(do_not_specialize=["M", "n1", "n2", "x0", "x1", "x2", "r0", "r1", "r2", "t0", "t1", "t2", "y0", "y1", "y2"])
def rms_kernel(
    X, R, W, Y, T, S, UB, M, n1, n2, x0, x1, x2, r0, r1, r2, t0, t1, t2, y0, y1, y2, eps,
    tile: tl.constexpr, recipe: tl.constexpr,
):  # fmt: skip
    """Y = norm(X [+ R]), T = X + R. A quantised Y takes its scale from S, or writes its scales there, bounded by UB."""
    rows = tl.program_id(0) * tile.rows + tl.arange(0, tile.rows)
    in_batch = rows[:, None] < M
    if tile.rows > 1:
        rows = tl.where(rows < M, rows, -1)
    safe = tl.maximum(rows, 0)[:, None]
    x_at = row_start(safe, n1, n2, x0, x1, x2, tile)
    y_at = row_start(safe, n1, n2, y0, y1, y2, tile)
    r_at = row_start(safe, n1, n2, r0, r1, r2, tile) if R is not None else x_at
    t_at = row_start(safe, n1, n2, t0, t1, t2, tile) if R is not None else x_at
    lane = tl.arange(0, tile.block)[None, :]
    dtype: tl.constexpr = X.dtype.element_ty

    expect(W, 0, tl.program_id(0) == 0, tile)
    wait_for_producer(tile.pdl, tile.late)

    squares = tl.zeros([tile.rows, tile.block], tl.float32)
    AGAIN: tl.constexpr = tile.chunks - tile.held  # whole chunks, read a second time for the output
    if AGAIN > 0:
        for start in tl.range(0, AGAIN, tile.unroll):
            for u in tl.static_range(tile.unroll):
                cols = (start + u) * tile.block + lane
                mask = (cols < AGAIN * tile.block) & in_batch
                total, rounded = load_sum(X, R, x_at, r_at, cols, mask, KEEP)
                v = rounded if recipe.variance_of_rounded_sum else total
                squares += v * v
    # All loads of the row come before the first store, because the compiler moves no load across a store.
    xs = ()
    rs = ()
    for c in tl.static_range(AGAIN, tile.chunks):
        cols = c * tile.block + lane
        mask = mask_of(c, lane, in_batch, tile.rows > 1, tile)
        xs += (read_raw(X + x_at + cols, mask),)
        if R is not None:
            rs += (read_raw(R + r_at + cols, mask),)
    weights = read_with_row(W, 0, lane, tile)
    given_scale = tl.load(S).to(tl.float32) if recipe.quant == 1 else 0.0
    bound = tl.load(UB).to(tl.float32) if UB is not None else 0.0
    held = ()
    for c in tl.static_range(AGAIN, tile.chunks):
        if R is not None:
            total, rounded = sum_of(xs[c - AGAIN], rs[c - AGAIN])
            cols = c * tile.block + lane
            mask = mask_of(c, lane, in_batch, tile.rows > 1, tile)
            tl.store(T + t_at + cols, rounded.to(T.dtype.element_ty), mask=mask)
            held += ((rounded if recipe.output_of_rounded_sum else total),)
            v = rounded if recipe.variance_of_rounded_sum else total
        else:
            held += (xs[c - AGAIN],)
            v = xs[c - AGAIN].to(tl.float32)
        squares += v * v
    release_consumer(tile.pdl, tile.late)
    sum_of_squares = tl.sum(squares, axis=1, keep_dims=True)
    s = tl.rsqrt((sum_of_squares if recipe.l2 else mean_of(sum_of_squares, tile.n)) + eps)

    inverse = s
    token_scale = s
    if recipe.quant == 1:
        tensor_scale = tl.full([tile.rows, 1], 0.0, tl.float32) + given_scale
        inverse = tl.div_rn(tl.full([tile.rows, 1], 1.0, tl.float32), tensor_scale)
    if recipe.quant == 2:
        largest = tl.zeros([tile.rows, tile.block], tl.float32)
        for c in tl.static_range(AGAIN, tile.chunks):
            w = by_column(W, 0, weights, c, lane, tile)
            y = to_quantise(held[c - AGAIN].to(tl.float32), s, w, dtype, recipe)
            largest = larger(largest, tl.abs(y))
        if AGAIN > 0:
            for again in tl.range(0, AGAIN):
                cols = again * tile.block + lane
                total, rounded = load_sum(X, R, x_at, r_at, cols, in_batch, KEEP)
                weight = read(W + cols, cols >= 0, KEEP) if W is not None else None
                h = rounded if recipe.output_of_rounded_sum else total
                largest = larger(largest, tl.abs(to_quantise(h, s, weight, dtype, recipe)))
        top = largest_of(largest, 1)
        if UB is not None:
            top = tl.minimum(top, bound, propagate_nan=tl.PropagateNan.ALL)
        token_scale = larger(tl.div_rn(top, tl.full([tile.rows, 1], recipe.qmax, tl.float32)), recipe.min_scale)
        inverse = tl.div_rn(tl.full([tile.rows, 1], 1.0, tl.float32), token_scale)
        tl.store(S + safe, token_scale, mask=in_batch)

    for c in tl.static_range(AGAIN, tile.chunks):
        cols = c * tile.block + lane
        mask = mask_of(c, lane, in_batch, tile.rows > 1, tile)
        w = by_column(W, 0, weights, c, lane, tile)
        y = to_quantise(held[c - AGAIN].to(tl.float32), s, w, dtype, recipe)
        store(Y, y_at, S, y, inverse, token_scale, cols, mask, rows, c * tile.block, tile.n, tile, recipe)
    if AGAIN > 0:  # from the end, because the L2 cache still holds what was read last
        for back in tl.range(0, AGAIN, tile.unroll):
            for u in tl.static_range(tile.unroll):
                column = ((AGAIN - 1) // tile.unroll * tile.unroll - back + u) * tile.block
                cols = column + lane
                inside = (cols < AGAIN * tile.block) & in_batch
                total, rounded = load_sum(X, R, x_at, r_at, cols, inside, DROP)
                weight = read(W + cols, cols < AGAIN * tile.block, KEEP) if W is not None else None
                if R is not None:
                    tl.store(T + t_at + cols, rounded.to(T.dtype.element_ty), mask=inside)
                h = rounded if recipe.output_of_rounded_sum else total
                y = to_quantise(h, s, weight, dtype, recipe)
                store(Y, y_at, S, y, inverse, token_scale, cols, inside, rows, column,
                      AGAIN * tile.block, tile, recipe)  # fmt: skip
