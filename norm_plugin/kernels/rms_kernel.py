"""The RMSNorm kernel: plain, fused add, Gemma, l2 norm, and any of them with a quantised output."""

from __future__ import annotations

import triton
import triton.language as tl

from norm_plugin.kernels.common import (
    DROP,
    KEEP,
    cast,
    chunk_mask,
    expect,
    larger,
    largest_of,
    mean_of,
    quotient,
    read,
    read_raw,
    read_with_row,
    release_consumer,
    row_start,
    wait_for_producer,
)

#: What QUANT means.
NO_QUANT, STATIC, PER_TOKEN, PER_BLOCK = 0, 1, 2, 3


@triton.jit
def sum_of(x, r, HAS_RESIDUAL: tl.constexpr):
    """(x + r before rounding, the same rounded to r's dtype), in fp32; x twice where there is no residual."""
    total = x.to(tl.float32)
    rounded = total
    if HAS_RESIDUAL:
        total += r.to(tl.float32)
        rounded = total.to(r.dtype).to(tl.float32)
    return total, rounded


@triton.jit
def load_sum(X, R, x_at, r_at, cols, mask, HAS_RESIDUAL: tl.constexpr, STAY: tl.constexpr):
    """The sum of one chunk that is read for it."""
    x = read_raw(X + x_at + cols, mask, STAY)
    r = read_raw(R + r_at + cols, mask, STAY) if HAS_RESIDUAL else None
    return sum_of(x, r, HAS_RESIDUAL)


@triton.jit
def weight_chunk(W, weights, c: tl.constexpr, lane, in_batch, N: tl.constexpr, BLOCK: tl.constexpr,
                 WITH_ROW: tl.constexpr, HAS_WEIGHT: tl.constexpr):  # fmt: skip
    """The weight of chunk c: read with the row, or now; None where there is no weight."""
    if not HAS_WEIGHT:
        w = None
    elif WITH_ROW:
        w = weights[c]
    else:
        w = read(W + c * BLOCK + lane, chunk_mask(c * BLOCK + lane, in_batch, c * BLOCK + BLOCK > N, False, N))
    return w


@triton.jit
def scale(h, s, w, dtype: tl.constexpr, HAS_WEIGHT: tl.constexpr, GEMMA: tl.constexpr, HF: tl.constexpr,
          WEIGHT_FIRST: tl.constexpr):  # fmt: skip
    """h * s * w before its last rounding."""
    if not HAS_WEIGHT:
        y = h * s
    else:
        w = w.to(tl.float32)
        if GEMMA:
            w = w + 1.0
        if WEIGHT_FIRST:
            y = h * w * s
        elif HF:
            y = (h * s).to(dtype).to(tl.float32) * w
        else:
            y = h * s * w
    return y


@triton.jit
def store(Y, y_at, S, y, inverse, token_scale, cols, mask, rows, column, END: tl.constexpr,
          N: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, QUANT: tl.constexpr, GROUP: tl.constexpr,
          QMAX: tl.constexpr, MIN_SCALE: tl.constexpr, FP8_UNIT: tl.constexpr):  # fmt: skip
    """Round one chunk and write it; with PER_BLOCK its scales too, up to column END."""
    out: tl.constexpr = Y.dtype.element_ty
    if QUANT == 0:
        y = y.to(out)
    elif QUANT == 1:
        y = cast(y * inverse, QMAX, out, FP8_UNIT)
    elif QUANT == 2:
        y = y * inverse if out == tl.int8 else quotient(y, inverse, token_scale, FP8_UNIT)
        y = cast(y, QMAX, out, FP8_UNIT)
    else:
        blocks = tl.reshape(y, [ROWS, BLOCK // GROUP, GROUP])
        largest = largest_of(blocks, 2)
        scales = larger(tl.div_rn(largest, tl.full([ROWS, BLOCK // GROUP, 1], QMAX, tl.float32)), MIN_SCALE)
        inverses = tl.div_rn(tl.full([ROWS, BLOCK // GROUP, 1], 1.0, tl.float32), scales)
        blocks = blocks * inverses if out == tl.int8 else quotient(blocks, inverses, scales, FP8_UNIT)
        y = tl.reshape(cast(blocks, QMAX, out, FP8_UNIT), [ROWS, BLOCK])
        block = column // GROUP + tl.arange(0, BLOCK // GROUP)[None, :]
        in_row = (block < END // GROUP) & (rows[:, None] >= 0)
        place = S + rows[:, None].to(tl.int64) * (N // GROUP) + block
        tl.store(place, tl.reshape(scales, [ROWS, BLOCK // GROUP]), mask=in_row)
    tl.store(Y + y_at + cols, y, mask=mask)


@triton.jit(do_not_specialize=["M", "n1", "n2", "x0", "x1", "x2", "r0", "r1", "r2", "t0", "t1", "t2", "y0", "y1", "y2"])
def rms_kernel(
    X, R, W, Y, T, S, UB, M, n1, n2, x0, x1, x2, r0, r1, r2, t0, t1, t2, y0, y1, y2, eps,
    N: tl.constexpr, POWER: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr, UNROLL: tl.constexpr,
    HELD: tl.constexpr, WITH_ROW: tl.constexpr, ROWS: tl.constexpr, LEVELS: tl.constexpr, ALIGN: tl.constexpr,
    PDL: tl.constexpr, LATE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, GEMMA: tl.constexpr, HF: tl.constexpr,
    VARIANCE_OF_ROUNDED: tl.constexpr, OUTPUT_OF_ROUNDED: tl.constexpr, WEIGHT_FIRST: tl.constexpr,
    L2: tl.constexpr, QUANT: tl.constexpr, GROUP: tl.constexpr, QMAX: tl.constexpr, MIN_SCALE: tl.constexpr,
    FP8_UNIT: tl.constexpr,
):  # fmt: skip
    """Y = norm(X [+ R]) of ROWS rows, T = X + R; S holds or takes the scales of a quantised Y, UB bounds them."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_batch = rows[:, None] < M
    if ROWS > 1:
        rows = tl.where(rows < M, rows, -1)
    safe = tl.maximum(rows, 0)[:, None]
    x_at = row_start(safe, n1, n2, x0, x1, x2, LEVELS, ALIGN)
    y_at = row_start(safe, n1, n2, y0, y1, y2, LEVELS, ALIGN)
    r_at = row_start(safe, n1, n2, r0, r1, r2, LEVELS, ALIGN) if HAS_RESIDUAL else x_at
    t_at = row_start(safe, n1, n2, t0, t1, t2, LEVELS, ALIGN) if HAS_RESIDUAL else x_at
    lane = tl.arange(0, BLOCK)[None, :]
    dtype: tl.constexpr = X.dtype.element_ty

    if WITH_ROW and HAS_WEIGHT:
        expect(W, 0, tl.program_id(0) == 0, N, POWER, PDL)
    wait_for_producer(PDL, LATE)

    squares = tl.zeros([ROWS, BLOCK], tl.float32)
    AGAIN: tl.constexpr = CHUNKS - HELD  # whole chunks, read a second time for the output
    if AGAIN > 0:
        for start in tl.range(0, AGAIN, UNROLL):
            for u in tl.static_range(UNROLL):
                cols = (start + u) * BLOCK + lane
                mask = (cols < AGAIN * BLOCK) & in_batch
                total, rounded = load_sum(X, R, x_at, r_at, cols, mask, HAS_RESIDUAL, KEEP)
                v = rounded if VARIANCE_OF_ROUNDED else total
                squares += v * v
    # Everything that the row needs is asked for at once, before the first store: no load is moved across one.
    xs = ()
    rs = ()
    for c in tl.static_range(AGAIN, CHUNKS):
        cols = c * BLOCK + lane
        mask = chunk_mask(cols, in_batch, c * BLOCK + BLOCK > N, ROWS > 1, N)
        xs += (read_raw(X + x_at + cols, mask),)
        if HAS_RESIDUAL:
            rs += (read_raw(R + r_at + cols, mask),)
    weights = ()
    if WITH_ROW and HAS_WEIGHT:
        weights = read_with_row(W, 0, lane, in_batch, N, BLOCK, CHUNKS)
    given_scale = tl.load(S).to(tl.float32) if QUANT == 1 else 0.0
    bound = tl.load(UB).to(tl.float32) if UB is not None else 0.0
    held = ()
    for c in tl.static_range(AGAIN, CHUNKS):
        if HAS_RESIDUAL:
            total, rounded = sum_of(xs[c - AGAIN], rs[c - AGAIN], HAS_RESIDUAL)
            cols = c * BLOCK + lane
            mask = chunk_mask(cols, in_batch, c * BLOCK + BLOCK > N, ROWS > 1, N)
            tl.store(T + t_at + cols, rounded.to(T.dtype.element_ty), mask=mask)
            held += ((rounded if OUTPUT_OF_ROUNDED else total),)
            v = rounded if VARIANCE_OF_ROUNDED else total
        else:
            held += (xs[c - AGAIN],)
            v = xs[c - AGAIN].to(tl.float32)
        squares += v * v
    release_consumer(PDL, LATE)
    sum_of_squares = tl.sum(squares, axis=1, keep_dims=True)
    s = tl.rsqrt((sum_of_squares if L2 else mean_of(sum_of_squares, N)) + eps)

    inverse = s
    token_scale = s
    if QUANT == 1:
        tensor_scale = tl.full([ROWS, 1], 0.0, tl.float32) + given_scale
        inverse = tl.div_rn(tl.full([ROWS, 1], 1.0, tl.float32), tensor_scale)
    if QUANT == 2:
        largest = tl.zeros([ROWS, BLOCK], tl.float32)
        for c in tl.static_range(AGAIN, CHUNKS):
            w = weight_chunk(W, weights, c, lane, in_batch, N, BLOCK, WITH_ROW, HAS_WEIGHT)
            y = scale(held[c - AGAIN].to(tl.float32), s, w, dtype, HAS_WEIGHT, GEMMA, HF, WEIGHT_FIRST)
            largest = larger(largest, tl.abs(y.to(dtype).to(tl.float32) if HF else y))
        if AGAIN > 0:
            for again in tl.range(0, AGAIN):
                cols = again * BLOCK + lane
                total, rounded = load_sum(X, R, x_at, r_at, cols, in_batch, HAS_RESIDUAL, KEEP)
                weight = read(W + cols, cols >= 0, KEEP) if HAS_WEIGHT else None
                h = rounded if OUTPUT_OF_ROUNDED else total
                y = scale(h, s, weight, dtype, HAS_WEIGHT, GEMMA, HF, WEIGHT_FIRST)
                largest = larger(largest, tl.abs(y.to(dtype).to(tl.float32) if HF else y))
        top = largest_of(largest, 1)
        if UB is not None:
            top = tl.minimum(top, bound, propagate_nan=tl.PropagateNan.ALL)
        token_scale = larger(tl.div_rn(top, tl.full([ROWS, 1], QMAX, tl.float32)), MIN_SCALE)
        inverse = tl.div_rn(tl.full([ROWS, 1], 1.0, tl.float32), token_scale)
        tl.store(S + safe, token_scale, mask=in_batch)

    for c in tl.static_range(AGAIN, CHUNKS):
        cols = c * BLOCK + lane
        mask = chunk_mask(cols, in_batch, c * BLOCK + BLOCK > N, ROWS > 1, N)
        w = weight_chunk(W, weights, c, lane, in_batch, N, BLOCK, WITH_ROW, HAS_WEIGHT)
        y = scale(held[c - AGAIN].to(tl.float32), s, w, dtype, HAS_WEIGHT, GEMMA, HF, WEIGHT_FIRST)
        if HF and QUANT > 0:
            y = y.to(dtype).to(tl.float32)
        store(Y, y_at, S, y, inverse, token_scale, cols, mask, rows, c * BLOCK,
              N, N, BLOCK, ROWS, QUANT, GROUP, QMAX, MIN_SCALE, FP8_UNIT)  # fmt: skip
    if AGAIN > 0:  # from the end: what was read last is what the L2 cache still holds
        for back in tl.range(0, AGAIN, UNROLL):
            for u in tl.static_range(UNROLL):
                column = ((AGAIN - 1) // UNROLL * UNROLL - back + u) * BLOCK
                cols = column + lane
                inside = (cols < AGAIN * BLOCK) & in_batch
                total, rounded = load_sum(X, R, x_at, r_at, cols, inside, HAS_RESIDUAL, DROP)
                weight = read(W + cols, cols < AGAIN * BLOCK, KEEP) if HAS_WEIGHT else None
                if HAS_RESIDUAL:
                    tl.store(T + t_at + cols, rounded.to(T.dtype.element_ty), mask=inside)
                h = rounded if OUTPUT_OF_ROUNDED else total
                y = scale(h, s, weight, dtype, HAS_WEIGHT, GEMMA, HF, WEIGHT_FIRST)
                if HF and QUANT > 0:
                    y = y.to(dtype).to(tl.float32)
                store(Y, y_at, S, y, inverse, token_scale, cols, inside, rows, column,
                      AGAIN * BLOCK, N, BLOCK, ROWS, QUANT, GROUP, QMAX, MIN_SCALE, FP8_UNIT)  # fmt: skip
