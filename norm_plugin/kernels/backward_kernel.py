"""The backward kernels: the gradient of a norm of each group of a row, gated or not, with or without a mean.

Row by row, for h = x (or x * act(z), where the gate comes first), its mean and scale s, xhat = (h - mean) * s:

    d     = dy (or dy * act(z), where the gate comes last)       what reaches the weight and the bias
    dh    = s * (d * w - mean(d * w)) - xhat * (s * mean(d * w * xhat))
    dw, db = the sums over the rows of d * xhat, d

Written so, of what is as large as dh only two things are rounded, by a fused multiply-add each: the difference in its
brackets (where there is no mean, d * w), and dh itself.

A program takes a block of consecutive rows and keeps its part of both sums in registers; `sum_kernel` adds up the
parts. So no sum depends on which program was first. Where a program has one part of many rows, its blocks are so long
that what a sum loses to its roundings is summed beside it, and `sum_kernel` does so always.
"""

from __future__ import annotations

import triton
import triton.language as tl

from norm_plugin.kernels.backward_parts import (
    add_fours,
    anew,
    gate_slope,
    layer_statistics,
    mask_of,
    normed,
    reaching,
    rms_statistics,
    settled,
    with_rows,
)
from norm_plugin.kernels.common import (
    add_pairs,
    gate,
    mean_of,
    read,
    read_raw,
    release_consumer,
    row_start,
    wait_for_producer,
)


@triton.jit(do_not_specialize=["M", "n1", "n2", "g0", "g1", "g2", "x0", "x1", "x2", "z0", "z1", "z2", "a0", "a1", "a2",
                               "d0", "d1", "d2", "e0", "e1", "e2"])  # fmt: skip
def backward_kernel(
    DY, X, Z, A, W, B, DX, DZ, PW, PB, STATS, M, n1, n2, g0, g1, g2, x0, x1, x2, z0, z1, z2, a0, a1, a2,
    d0, d1, d2, e0, e1, e2, eps,
    N: tl.constexpr, G: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
    ROWS: tl.constexpr, STAGES: tl.constexpr, HOLD: tl.constexpr, LEVELS: tl.constexpr,
    ALIGN: tl.constexpr, PDL: tl.constexpr,
    RMS: tl.constexpr, L2: tl.constexpr, GEMMA: tl.constexpr, GATE_FIRST: tl.constexpr, GATE_LAST: tl.constexpr,
    SIGMOID: tl.constexpr, FLAT: tl.constexpr, FENCE: tl.constexpr,
):  # fmt: skip
    """DX (and DZ) of a block of rows, A added to DX; PW and PB take the block's part of the sums, [blocks, G * N].

    A program does one group of G in one of PARTS ranges of columns. With one part, the statistics of a row are computed
    here; with more, `statistics_kernel` has written them to STATS. FLAT: a thread has all rows of its columns.
    """
    HAS_WEIGHT: tl.constexpr = W is not None
    GATED: tl.constexpr = GATE_FIRST or GATE_LAST
    WIDE: tl.constexpr = BLOCK * CHUNKS
    blocks = tl.num_programs(0) // (G * PARTS)
    block = tl.program_id(0) // (G * PARTS)
    group = tl.program_id(0) // PARTS % G
    part = tl.program_id(0) % PARTS
    tiles = tl.cdiv(M, ROWS)
    first = block * tl.cdiv(tiles, blocks)
    last = tl.minimum(first + tl.cdiv(tiles, blocks), tiles)
    lane = part * WIDE + tl.arange(0, BLOCK)[None, :]
    w_at = group * N
    wait_for_producer(PDL, True)

    SUMMED: tl.constexpr = 1 if FLAT else ROWS
    EXACT: tl.constexpr = PARTS > 1
    weight_sums = ()
    weight_lost = ()
    bias_sums = ()
    bias_lost = ()
    weights = ()
    for c in tl.static_range(CHUNKS):
        if PW is not None:
            weight_sums += (tl.zeros([SUMMED, BLOCK], tl.float32),)
            weight_lost += (tl.zeros([SUMMED, BLOCK], tl.float32),)
        if PB is not None:
            bias_sums += (tl.zeros([SUMMED, BLOCK], tl.float32),)
            bias_lost += (tl.zeros([SUMMED, BLOCK], tl.float32),)
        if HOLD and HAS_WEIGHT:
            of_weight = mask_of(c, lane, True, False, N, BLOCK, CHUNKS, PARTS)
            weights += (read_raw(W + w_at + c * BLOCK + lane, of_weight),)

    for tile in tl.range(first, last, num_stages=STAGES):
        zero = tile >> 31
        last_zero = (tile | 1) >> 31
        rows = tile * ROWS + tl.arange(0, ROWS)[:, None]
        inside = rows < M
        rows = tl.minimum(rows, M - 1)
        g_at = row_start(rows, n1, n2, g0, g1, g2, LEVELS, ALIGN) + w_at
        x_at = row_start(rows, n1, n2, x0, x1, x2, LEVELS, ALIGN) + w_at
        z_at = row_start(rows, n1, n2, z0, z1, z2, LEVELS, ALIGN) + w_at if GATED else x_at
        a_at = row_start(rows, n1, n2, a0, a1, a2, LEVELS, ALIGN) + w_at if A is not None else x_at
        d_at = row_start(rows, n1, n2, d0, d1, d2, LEVELS, ALIGN) + w_at
        e_at = row_start(rows, n1, n2, e0, e1, e2, LEVELS, ALIGN) + w_at if GATED else x_at
        xs = ()
        gs = ()
        zs = ()
        added = ()
        for c in tl.static_range(CHUNKS):
            cols = c * BLOCK + lane
            mask = mask_of(c, lane, inside, ROWS > 1, N, BLOCK, CHUNKS, PARTS)
            xs += (read_raw(X + x_at + cols, mask),)
            gs += (read_raw(DY + g_at + cols, mask),)
            zs += (read_raw(Z + z_at + cols, mask) if GATED else xs[c],)
            added += (read_raw(A + a_at + cols, mask) if A is not None else xs[c],)

        mean = tl.zeros([ROWS, 1], tl.float32)
        left = mean
        shift = mean
        if PARTS > 1:
            at = rows * G + group
            s = tl.load(STATS + at)
            share = tl.load(STATS + M * G + at)
            if not RMS:
                shift = tl.load(STATS + 2 * M * G + at)
                mean = tl.load(STATS + 3 * M * G + at)
                left = tl.load(STATS + 4 * M * G + at)
        else:
            sums = tl.zeros([ROWS, BLOCK], tl.float32)
            squares = tl.zeros([ROWS, BLOCK], tl.float32)
            gradients = tl.zeros([ROWS, BLOCK], tl.float32)
            products = tl.zeros([ROWS, BLOCK], tl.float32)
            if not RMS:
                for c in tl.static_range(CHUNKS):
                    sums += normed(xs[c], zs[c], GATE_FIRST, SIGMOID)
                mean = mean_of(tl.sum(sums, axis=1, keep_dims=True), N)
                sums = tl.zeros([ROWS, BLOCK], tl.float32)
            for c in tl.static_range(CHUNKS):
                cols = c * BLOCK + lane
                w = None
                if HAS_WEIGHT:
                    in_row = mask_of(c, lane, True, False, N, BLOCK, CHUNKS, PARTS)
                    w = anew(weights[c], zero, FENCE) if HOLD else read_raw(W + w_at + cols, in_row)
                d, dw = reaching(gs[c], zs[c], w, HAS_WEIGHT, GEMMA, GATE_LAST, SIGMOID)
                x = xs[c] if RMS else anew(xs[c], zero, FENCE)  # of a row with a mean, for the second time
                h = normed(x, zs[c], GATE_FIRST, SIGMOID)
                if not RMS:
                    h = h - mean
                    if c * BLOCK + BLOCK > N:
                        h = tl.where(cols < N, h, 0.0)
                    sums += h
                    gradients += dw
                squares += h * h
                products += dw * h
            if RMS:
                total, product = tl.reduce((squares, products), 1, add_pairs, keep_dims=True)
                s, share = rms_statistics(total, product, eps, N, L2)
            else:
                total, square, gradient, product = tl.reduce(
                    (sums, squares, gradients, products), 1, add_fours, keep_dims=True
                )
                left, s, shift, share = layer_statistics(total, square, gradient, product, eps, N)
        if ROWS > 1:
            s = tl.where(inside, s, 0.0)  # of a row that is not there, 0 * inf would spoil the sums

        pull = s * share
        weight_next = ()
        weight_off = ()
        bias_next = ()
        bias_off = ()
        for c in tl.static_range(CHUNKS):
            cols = c * BLOCK + lane
            mask = mask_of(c, lane, inside, ROWS > 1, N, BLOCK, CHUNKS, PARTS)
            in_row = mask_of(c, lane, True, False, N, BLOCK, CHUNKS, PARTS)
            w = None
            if HAS_WEIGHT:
                w = anew(weights[c], last_zero, FENCE) if HOLD else read_raw(W + w_at + cols, in_row)
            x, g, z = anew(xs[c], last_zero, FENCE), anew(gs[c], last_zero, FENCE), zs[c]
            if GATED:
                z = anew(z, last_zero, FENCE).to(tl.float32)
            d, dw = reaching(g, z, w, HAS_WEIGHT, GEMMA, GATE_LAST, SIGMOID)
            h = normed(x, z, GATE_FIRST, SIGMOID)
            xhat = h * s if RMS else tl.fma(h - mean, s, -left * s)
            if not RMS:
                dw = tl.fma(d, w.to(tl.float32), -shift) if HAS_WEIGHT else d - shift
            dh = tl.fma(dw, s, -(xhat * pull))
            if GATED:
                if GATE_FIRST:
                    dz = dh * x.to(tl.float32) * gate_slope(z, SIGMOID)
                    dh = dh * gate(z, SIGMOID)
                else:
                    y = xhat * w.to(tl.float32) if HAS_WEIGHT else xhat
                    if B is not None:
                        y = y + read(B + w_at + cols, in_row)
                    dz = g.to(tl.float32) * y * gate_slope(z, SIGMOID)
                tl.store(DZ + e_at + cols, dz.to(DZ.dtype.element_ty), mask=mask)
            if A is not None:
                dh = dh + added[c].to(tl.float32)
            tl.store(DX + d_at + cols, dh.to(DX.dtype.element_ty), mask=mask)
            if PW is not None:
                total, lost = with_rows(weight_sums[c], weight_lost[c], d * xhat, FLAT, EXACT)
                weight_next += (total,)
                weight_off += (lost,)
            if PB is not None:
                total, lost = with_rows(bias_sums[c], bias_lost[c], d, FLAT, EXACT)
                bias_next += (total,)
                bias_off += (lost,)
        weight_sums = weight_next
        weight_lost = weight_off
        bias_sums = bias_next
        bias_lost = bias_off

    release_consumer(PDL, True)
    for c in tl.static_range(CHUNKS):
        cols = c * BLOCK + lane
        mask = mask_of(c, lane, True, False, N, BLOCK, CHUNKS, PARTS)
        place = block.to(tl.int64) * (G * N) + w_at + cols
        if PW is not None:
            found = settled(weight_sums[c], weight_lost[c])
            tl.store(PW + place, tl.sum(found, axis=0, keep_dims=True), mask=mask)
        if PB is not None:
            found = settled(bias_sums[c], bias_lost[c])
            tl.store(PB + place, tl.sum(found, axis=0, keep_dims=True), mask=mask)
