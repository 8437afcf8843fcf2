"""The gated norm kernel: LayerNorm or RMSNorm of each group of a row, gated before or after; also plain LayerNorm."""

from __future__ import annotations

import triton
import triton.language as tl

from norm_plugin.kernels.common import (
    DROP,
    KEEP,
    add_pairs,
    cast,
    chunk_mask,
    expect,
    gate,
    mean_of,
    read,
    read_raw,
    read_with_row,
    release_consumer,
    row_start,
    wait_for_producer,
)


@triton.jit
def load_gated(X, Z, x_at, z_at, cols, mask, GATE_FIRST: tl.constexpr, SIGMOID: tl.constexpr,
               STAY: tl.constexpr = 0):  # fmt: skip
    """One chunk of x in fp32, gated already where the gate comes first."""
    h = read(X + x_at + cols, mask, STAY)
    if GATE_FIRST:
        h = h * gate(read(Z + z_at + cols, mask, STAY), SIGMOID)
    return h


@triton.jit
def finish(xhat, w, b, z, dtype: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
           GATE_LAST: tl.constexpr, SIGMOID: tl.constexpr, HF: tl.constexpr):  # fmt: skip
    """xhat * w + b, gated where the gate comes last, before the last rounding."""
    y = xhat.to(dtype).to(tl.float32) if HF else xhat
    if HAS_WEIGHT:
        y = y * w.to(tl.float32)
    if HAS_BIAS:
        y = y + b.to(tl.float32)
    if HF:
        y = y.to(dtype).to(tl.float32)
    if GATE_LAST:
        y = y * gate(z.to(tl.float32), SIGMOID)
    return y


@triton.jit
def quantised(y, inverse, dtype: tl.constexpr, ROUND: tl.constexpr, QMAX: tl.constexpr, out_dtype: tl.constexpr,
              FP8_UNIT: tl.constexpr):  # fmt: skip
    """y by a static scale, rounded to x's dtype first where its numerics say so."""
    if ROUND:
        y = y.to(dtype).to(tl.float32)
    return cast(y * inverse, QMAX, out_dtype, FP8_UNIT)


@triton.jit(do_not_specialize=["M", "n1", "n2", "x0", "x1", "x2", "z0", "z1", "z2", "y0", "y1", "y2"])
def gated_kernel(
    X, Z, W, B, Y, S, MEAN, RSTD, M, n1, n2, x0, x1, x2, z0, z1, z2, y0, y1, y2, eps,
    N: tl.constexpr, POWER: tl.constexpr, G: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
    UNROLL: tl.constexpr, HELD: tl.constexpr, WITH_ROW: tl.constexpr, ROWS: tl.constexpr, LEVELS: tl.constexpr,
    ALIGN: tl.constexpr, PDL: tl.constexpr, LATE: tl.constexpr,
    RMS: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, GATE_FIRST: tl.constexpr,
    GATE_LAST: tl.constexpr, SIGMOID: tl.constexpr, HF: tl.constexpr, STATIC: tl.constexpr, ROUND: tl.constexpr,
    QMAX: tl.constexpr, FP8_UNIT: tl.constexpr,
):  # fmt: skip
    """Y = norm of ROWS groups of width N; M groups in all, G of them a row; S is the scale of a quantised Y."""
    index = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    in_batch = index < M
    index = tl.minimum(index, M - 1)
    row = index // G
    group = index % G
    w_at = group * N
    x_at = row_start(row, n1, n2, x0, x1, x2, LEVELS, ALIGN) + w_at
    y_at = row_start(row, n1, n2, y0, y1, y2, LEVELS, ALIGN) + w_at
    z_at = row_start(row, n1, n2, z0, z1, z2, LEVELS, ALIGN) + w_at if GATE_FIRST or GATE_LAST else x_at
    lane = tl.arange(0, BLOCK)[None, :]
    dtype: tl.constexpr = X.dtype.element_ty
    if WITH_ROW and HAS_WEIGHT:
        expect(W, w_at, tl.program_id(0) * ROWS < G, N, POWER, PDL)
    if WITH_ROW and HAS_BIAS:
        expect(B, w_at, tl.program_id(0) * ROWS < G, N, POWER, PDL)
    wait_for_producer(PDL, LATE)

    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    squares = tl.zeros([ROWS, BLOCK], tl.float32)
    AGAIN: tl.constexpr = CHUNKS - HELD  # whole chunks, read a second time for the output
    mean = tl.zeros([ROWS, 1], tl.float32)
    if AGAIN > 0:
        if not RMS:
            # Any value near the row's serves as a first mean; the first chunk's is within sqrt(CHUNKS) deviations.
            mean = tl.sum(load_gated(X, Z, x_at, z_at, lane, in_batch, GATE_FIRST, SIGMOID), axis=1, keep_dims=True)
            mean = mean * (1.0 / BLOCK)
        for start in tl.range(0, AGAIN, UNROLL):
            for u in tl.static_range(UNROLL):
                cols = (start + u) * BLOCK + lane
                mask = (cols < AGAIN * BLOCK) & in_batch
                h = load_gated(X, Z, x_at, z_at, cols, mask, GATE_FIRST, SIGMOID, KEEP)
                off = tl.where(cols < AGAIN * BLOCK, h - mean, 0.0)
                sums += off
                squares += off * off
    held = ()
    gates = ()
    for c in tl.static_range(AGAIN, CHUNKS):
        cols = c * BLOCK + lane
        mask = chunk_mask(cols, in_batch, c * BLOCK + BLOCK > N, ROWS > 1, N)
        if GATE_FIRST:
            held += (load_gated(X, Z, x_at, z_at, cols, mask, GATE_FIRST, SIGMOID),)
        else:
            held += (read_raw(X + x_at + cols, mask),)
        if GATE_LAST:  # read with x, not after the reduction: one memory latency instead of two
            gates += (read_raw(Z + z_at + cols, mask),)
    weights = ()
    biases = ()
    if WITH_ROW and HAS_WEIGHT:
        weights = read_with_row(W, w_at, lane, in_batch, N, BLOCK, CHUNKS)
    if WITH_ROW and HAS_BIAS:
        biases = read_with_row(B, w_at, lane, in_batch, N, BLOCK, CHUNKS)
    given_scale = tl.load(S).to(tl.float32) if STATIC else 0.0
    release_consumer(PDL, LATE)
    if AGAIN == 0 and not RMS:
        for c in tl.static_range(CHUNKS):
            sums += held[c].to(tl.float32)
        mean = mean_of(tl.sum(sums, axis=1, keep_dims=True), N)
        sums = tl.zeros([ROWS, BLOCK], tl.float32)
    for c in tl.static_range(AGAIN, CHUNKS):
        off = held[c - AGAIN].to(tl.float32)
        if not RMS:
            off = off - mean
            if c * BLOCK + BLOCK > N:
                off = tl.where(c * BLOCK + lane < N, off, 0.0)
            sums += off
        squares += off * off
    left = tl.zeros([ROWS, 1], tl.float32)
    if RMS:
        variance = mean_of(tl.sum(squares, axis=1, keep_dims=True), N)
    else:  # what the first mean left in the centred row is taken off as well, in the same reduction
        left, variance = tl.reduce((sums, squares), 1, add_pairs, keep_dims=True)
        left = mean_of(left, N)
        variance = mean_of(variance, N) - left * left
    rstd = tl.rsqrt(variance + eps)
    if RSTD is not None:
        place = group * (M // G) + row
        tl.store(RSTD + place, rstd, mask=in_batch)
        if not RMS:
            tl.store(MEAN + place, mean + left, mask=in_batch)

    inverse = rstd
    if STATIC:
        tensor_scale = tl.zeros([ROWS, 1], tl.float32) + given_scale
        inverse = tl.div_rn(tl.full([ROWS, 1], 1.0, tl.float32), tensor_scale)
    for c in tl.static_range(AGAIN, CHUNKS):
        cols = c * BLOCK + lane
        mask = chunk_mask(cols, in_batch, c * BLOCK + BLOCK > N, ROWS > 1, N)
        in_row = chunk_mask(cols, in_batch, c * BLOCK + BLOCK > N, False, N)
        h = held[c - AGAIN].to(tl.float32)
        xhat = h * rstd if RMS else tl.fma(h - mean, rstd, -left * rstd)
        w, b = None, None
        if HAS_WEIGHT:
            w = weights[c] if WITH_ROW else read(W + w_at + cols, in_row)
        if HAS_BIAS:
            b = biases[c] if WITH_ROW else read(B + w_at + cols, in_row)
        z = gates[c - AGAIN] if GATE_LAST else None
        y = finish(xhat, w, b, z, dtype, HAS_WEIGHT, HAS_BIAS, GATE_LAST, SIGMOID, HF)
        if STATIC:
            y = quantised(y, inverse, dtype, ROUND, QMAX, Y.dtype.element_ty, FP8_UNIT)
        tl.store(Y + y_at + cols, y.to(Y.dtype.element_ty), mask=mask)
    if AGAIN > 0:  # from the end: what was read last is what the L2 cache still holds
        for back in tl.range(0, AGAIN, UNROLL):
            for u in tl.static_range(UNROLL):
                cols = ((AGAIN - 1) // UNROLL * UNROLL - back + u) * BLOCK + lane
                whole = cols < AGAIN * BLOCK
                inside = whole & in_batch
                h = load_gated(X, Z, x_at, z_at, cols, inside, GATE_FIRST, SIGMOID, DROP)
                xhat = h * rstd if RMS else tl.fma(h - mean, rstd, -left * rstd)
                weight = read(W + w_at + cols, whole, KEEP) if HAS_WEIGHT else None
                bias = read(B + w_at + cols, whole, KEEP) if HAS_BIAS else None
                gating = read(Z + z_at + cols, inside, DROP) if GATE_LAST else None
                y = finish(xhat, weight, bias, gating, dtype, HAS_WEIGHT, HAS_BIAS, GATE_LAST, SIGMOID, HF)
                if STATIC:
                    y = quantised(y, inverse, dtype, ROUND, QMAX, Y.dtype.element_ty, FP8_UNIT)
                tl.store(Y + y_at + cols, y.to(Y.dtype.element_ty), mask=inside)
