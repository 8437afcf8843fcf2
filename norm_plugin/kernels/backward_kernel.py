"""The backward kernels: the gradient of a norm of each group of a row, gated or not, with or without a mean.

For each row, with h = x (or x * act(z), if the gate comes first), its mean, its scale s and xhat = (h - mean) * s:

    d     = dy (or dy * act(z), if the gate comes last)       what reaches the weight and the bias
    dh    = s * (d * w - mean(d * w)) - xhat * (s * mean(d * w * xhat))
    dw, db = the sums over the rows of d * xhat, d

In this form only two dh-sized values are rounded, each by one fused multiply-add: the difference in the brackets
(d * w, if there is no mean), and dh itself.

A program takes a block of consecutive rows and keeps its part of both sums in registers. `sum_kernel` adds up the
parts, so no sum depends on which program came first. `sum_kernel` compensates its sums; this kernel does so where a
program has one part of many rows, because its blocks are long.
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
    tile: tl.constexpr, recipe: tl.constexpr,
):  # fmt: skip
    """Writes DX (with A added) and DZ of a block of rows, and its part of the sums to PW and PB [blocks, groups * n].

    A program does one group in one of `parts` ranges of columns. With one part it computes the statistics of a row;
    with more, `statistics_kernel` has written them to STATS. `flat`: a thread has all rows of its columns.
    """
    WIDE: tl.constexpr = tile.block * tile.chunks
    blocks = tl.num_programs(0) // (recipe.groups * tile.parts)
    block = tl.program_id(0) // (recipe.groups * tile.parts)
    group = tl.program_id(0) // tile.parts % recipe.groups
    part = tl.program_id(0) % tile.parts
    tiles = tl.cdiv(M, tile.rows)
    first = block * tl.cdiv(tiles, blocks)
    last = tl.minimum(first + tl.cdiv(tiles, blocks), tiles)
    lane = part * WIDE + tl.arange(0, tile.block)[None, :]
    w_at = group * tile.n
    wait_for_producer(tile.pdl, True)

    SUMMED: tl.constexpr = 1 if tile.flat else tile.rows
    EXACT: tl.constexpr = tile.parts > 1
    weight_sums = ()
    weight_lost = ()
    bias_sums = ()
    bias_lost = ()
    weights = ()
    for c in tl.static_range(tile.chunks):
        if PW is not None:
            weight_sums += (tl.zeros([SUMMED, tile.block], tl.float32),)
            weight_lost += (tl.zeros([SUMMED, tile.block], tl.float32),)
        if PB is not None:
            bias_sums += (tl.zeros([SUMMED, tile.block], tl.float32),)
            bias_lost += (tl.zeros([SUMMED, tile.block], tl.float32),)
        if tile.hold and W is not None:
            of_weight = mask_of(c, lane, True, False, tile)
            weights += (read_raw(W + w_at + c * tile.block + lane, of_weight),)

    for number in tl.range(first, last, num_stages=tile.stages):
        zero = number >> 31
        last_zero = (number | 1) >> 31
        rows = number * tile.rows + tl.arange(0, tile.rows)[:, None]
        inside = rows < M
        rows = tl.minimum(rows, M - 1)
        g_at = row_start(rows, n1, n2, g0, g1, g2, tile) + w_at
        x_at = row_start(rows, n1, n2, x0, x1, x2, tile) + w_at
        z_at = row_start(rows, n1, n2, z0, z1, z2, tile) + w_at if Z is not None else x_at
        a_at = row_start(rows, n1, n2, a0, a1, a2, tile) + w_at if A is not None else x_at
        d_at = row_start(rows, n1, n2, d0, d1, d2, tile) + w_at
        e_at = row_start(rows, n1, n2, e0, e1, e2, tile) + w_at if Z is not None else x_at
        xs = ()
        gs = ()
        zs = ()
        added = ()
        for c in tl.static_range(tile.chunks):
            cols = c * tile.block + lane
            mask = mask_of(c, lane, inside, tile.rows > 1, tile)
            xs += (read_raw(X + x_at + cols, mask),)
            gs += (read_raw(DY + g_at + cols, mask),)
            zs += (read_raw(Z + z_at + cols, mask) if Z is not None else xs[c],)
            added += (read_raw(A + a_at + cols, mask) if A is not None else xs[c],)

        mean = tl.zeros([tile.rows, 1], tl.float32)
        left = mean
        shift = mean
        if tile.parts > 1:
            at = rows * recipe.groups + group
            s = tl.load(STATS + at)
            share = tl.load(STATS + M * recipe.groups + at)
            if not recipe.rms:
                shift = tl.load(STATS + 2 * M * recipe.groups + at)
                mean = tl.load(STATS + 3 * M * recipe.groups + at)
                left = tl.load(STATS + 4 * M * recipe.groups + at)
        else:
            sums = tl.zeros([tile.rows, tile.block], tl.float32)
            squares = tl.zeros([tile.rows, tile.block], tl.float32)
            gradients = tl.zeros([tile.rows, tile.block], tl.float32)
            products = tl.zeros([tile.rows, tile.block], tl.float32)
            if not recipe.rms:
                for c in tl.static_range(tile.chunks):
                    sums += normed(xs[c], zs[c], recipe)
                mean = mean_of(tl.sum(sums, axis=1, keep_dims=True), tile.n)
                sums = tl.zeros([tile.rows, tile.block], tl.float32)
            for c in tl.static_range(tile.chunks):
                cols = c * tile.block + lane
                w = None
                if W is not None:
                    in_row = mask_of(c, lane, True, False, tile)
                    w = anew(weights[c], zero, tile.fence) if tile.hold else read_raw(W + w_at + cols, in_row)
                d, dw = reaching(gs[c], zs[c], w, recipe)
                x = xs[c] if recipe.rms else anew(xs[c], zero, tile.fence)  # a row with a mean is used a second time
                h = normed(x, zs[c], recipe)
                if not recipe.rms:
                    h = h - mean
                    if c * tile.block + tile.block > tile.n:
                        h = tl.where(cols < tile.n, h, 0.0)
                    sums += h
                    gradients += dw
                squares += h * h
                products += dw * h
            if recipe.rms:
                total, product = tl.reduce((squares, products), 1, add_pairs, keep_dims=True)
                s, share = rms_statistics(total, product, eps, tile.n, recipe.l2)
            else:
                total, square, gradient, product = tl.reduce(
                    (sums, squares, gradients, products), 1, add_fours, keep_dims=True
                )
                left, s, shift, share = layer_statistics(total, square, gradient, product, eps, tile.n)
        if tile.rows > 1:
            s = tl.where(inside, s, 0.0)  # a row that does not exist would spoil the sums by 0 * inf

        pull = s * share
        weight_next = ()
        weight_off = ()
        bias_next = ()
        bias_off = ()
        for c in tl.static_range(tile.chunks):
            cols = c * tile.block + lane
            mask = mask_of(c, lane, inside, tile.rows > 1, tile)
            in_row = mask_of(c, lane, True, False, tile)
            w = None
            if W is not None:
                w = anew(weights[c], last_zero, tile.fence) if tile.hold else read_raw(W + w_at + cols, in_row)
            x, g, z = anew(xs[c], last_zero, tile.fence), anew(gs[c], last_zero, tile.fence), zs[c]
            if Z is not None:
                z = anew(z, last_zero, tile.fence).to(tl.float32)
            d, dw = reaching(g, z, w, recipe)
            h = normed(x, z, recipe)
            xhat = h * s if recipe.rms else tl.fma(h - mean, s, -left * s)
            if not recipe.rms:
                dw = tl.fma(d, w.to(tl.float32), -shift) if W is not None else d - shift
            dh = tl.fma(dw, s, -(xhat * pull))
            if Z is not None:
                if recipe.gate_first:
                    dz = dh * x.to(tl.float32) * gate_slope(z, recipe.sigmoid)
                    dh = dh * gate(z, recipe.sigmoid)
                else:
                    y = xhat * w.to(tl.float32) if W is not None else xhat
                    if B is not None:
                        y = y + read(B + w_at + cols, in_row)
                    dz = g.to(tl.float32) * y * gate_slope(z, recipe.sigmoid)
                tl.store(DZ + e_at + cols, dz.to(DZ.dtype.element_ty), mask=mask)
            if A is not None:
                dh = dh + added[c].to(tl.float32)
            tl.store(DX + d_at + cols, dh.to(DX.dtype.element_ty), mask=mask)
            if PW is not None:
                total, lost = with_rows(weight_sums[c], weight_lost[c], d * xhat, tile.flat, EXACT)
                weight_next += (total,)
                weight_off += (lost,)
            if PB is not None:
                total, lost = with_rows(bias_sums[c], bias_lost[c], d, tile.flat, EXACT)
                bias_next += (total,)
                bias_off += (lost,)
        weight_sums = weight_next
        weight_lost = weight_off
        bias_sums = bias_next
        bias_lost = bias_off

    release_consumer(tile.pdl, True)
    for c in tl.static_range(tile.chunks):
        cols = c * tile.block + lane
        mask = mask_of(c, lane, True, False, tile)
        place = block.to(tl.int64) * (recipe.groups * tile.n) + w_at + cols
        if PW is not None:
            found = settled(weight_sums[c], weight_lost[c])
            tl.store(PW + place, tl.sum(found, axis=0, keep_dims=True), mask=mask)
        if PB is not None:
            found = settled(bias_sums[c], bias_lost[c])
            tl.store(PB + place, tl.sum(found, axis=0, keep_dims=True), mask=mask)
