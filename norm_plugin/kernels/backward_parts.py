"""The parts of the backward: the formulas of its kernel, the statistics of rows too wide for it, and the last sum."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from norm_plugin.kernels.common import (
    add_pairs,
    chunk_mask,
    gate,
    mean_of,
    read_raw,
    release_consumer,
    row_start,
    wait_for_producer,
)
from norm_plugin.kernels.constants import constants


@constants
class Tile(NamedTuple):
    """How a program holds `rows` rows of `n` columns (or one of `parts` parts of them): in `chunks` of `block` columns.
    `stages`, `hold` and `flat` are as in backward_configs, `levels` and `align` as in a forward tile. `fence`: see
    `anew`. `pdl`: launched dependently."""

    n: int
    parts: int
    block: int
    chunks: int
    rows: int
    stages: int
    hold: bool
    flat: bool
    fence: bool
    levels: int
    align: int
    pdl: bool


@constants
class Recipe(NamedTuple):
    """Which norm the gradients are of."""

    groups: int
    rms: bool
    l2: bool
    gemma: bool
    gate_first: bool
    gate_last: bool
    sigmoid: bool


@triton.jit
def add_fours(a0, a1, a2, a3, b0, b1, b2, b3):
    """The sum of two quadruples."""
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@triton.jit
def two_sum(a, b):
    """(a + b, what its rounding lost), by Knuth."""
    total = a + b
    of_b = total - a
    return total, (a - (total - of_b)) + (b - of_b)


@triton.jit
def add_exactly(a, a_lost, b, b_lost):
    """The sum of two compensated sums."""
    total, lost = two_sum(a, b)
    return total, a_lost + b_lost + lost


@triton.jit
def settled(total, lost):
    """total + lost; total alone if it is not finite, because then lost is NaN."""
    return tl.where(lost == lost, total + lost, total)


@triton.jit
def with_rows(total, lost, rows, FLAT: tl.constexpr, EXACT: tl.constexpr):
    """Adds the rows of a tile to a sum over rows. EXACT: the sum is compensated, and `lost` is what it lost so far."""
    rows = tl.sum(rows, axis=0, keep_dims=True) if FLAT else rows
    if EXACT:
        total, off = two_sum(total, rows)
        lost += off
    else:
        total += rows
    return total, lost


@triton.jit
def gate_slope(z, SIGMOID: tl.constexpr):
    """The derivative of act at z."""
    s = tl.sigmoid(z)
    rest = tl.sigmoid(-z)  # 1 - s, without cancellation
    return s * rest if SIGMOID else s + z * s * rest


@triton.jit
def mask_of(c: tl.constexpr, lane, inside, MANY: tl.constexpr, tile: tl.constexpr):
    """The mask of chunk c of a program's columns, or None."""
    END: tl.constexpr = (c + 1 if tile.parts == 1 else tile.parts * tile.chunks) * tile.block
    return chunk_mask(c * tile.block + lane, inside, tile.n < END, MANY, tile.n)


@triton.jit
def anew(raw, zero, FENCE: tl.constexpr):
    """The same value, which the compiler takes for another one, because it cannot know that `zero` is 0. Otherwise it
    would keep the fp32 value until its next use, in twice as many registers as the raw one."""
    if FENCE and raw.dtype.primitive_bitwidth == 16 and raw.shape[1] > 1:  # two at once
        xor: tl.constexpr = "xor.b32 $0, $1, $2;"
        raw = tl.inline_asm_elementwise(xor, "=r,r,r", [raw, zero.to(tl.int16)], dtype=raw.dtype, is_pure=True, pack=2)
    return raw


@triton.jit
def normed(x, z, recipe: tl.constexpr):
    """The normalized value: x, or the gated x."""
    h = x.to(tl.float32)
    if recipe.gate_first:
        h = h * gate(z.to(tl.float32), recipe.sigmoid)
    return h


@triton.jit
def reaching(g, z, w, recipe: tl.constexpr):
    """(d, d * w): the gradients of xhat * w + b and of xhat."""
    d = g.to(tl.float32)
    if recipe.gate_last:
        d = d * gate(z.to(tl.float32), recipe.sigmoid)
    if w is not None:
        w = w.to(tl.float32)
        return d, d * (w + 1.0 if recipe.gemma else w)
    return d, d


@triton.jit
def average(total, N: tl.constexpr, L2: tl.constexpr):
    """total / N, or total for the l2 norm, which takes no mean."""
    return total if L2 else mean_of(total, N)


@triton.jit
def rms_statistics(squares, products, eps, N: tl.constexpr, L2: tl.constexpr):
    """(s, mean(d * w * xhat)) from the sums of h^2 and of d * w * h."""
    s = tl.rsqrt(average(squares, N, L2) + eps)
    return s, s * average(products, N, L2)


@triton.jit
def layer_statistics(sums, squares, gradients, products, eps, N: tl.constexpr):
    """(rest of the mean, s, mean(d * w), mean(d * w * xhat)), from the sums of an almost centred row."""
    left = mean_of(sums, N)
    s = tl.rsqrt(mean_of(squares, N) - left * left + eps)
    shift = mean_of(gradients, N)
    return left, s, shift, s * (mean_of(products, N) - left * shift)


@triton.jit(do_not_specialize=["M", "n1", "n2", "g0", "g1", "g2", "x0", "x1", "x2", "z0", "z1", "z2"])
def statistics_kernel(
    DY, X, Z, W, STATS, M, n1, n2, g0, g1, g2, x0, x1, x2, z0, z1, z2, eps,
    UNROLL: tl.constexpr, tile: tl.constexpr, recipe: tl.constexpr,
):  # fmt: skip
    """Writes the statistics of rows that do not fit registers to STATS, one plane for each statistic."""
    rows = tl.program_id(0) // recipe.groups + tl.zeros([1, 1], tl.int32)
    group = tl.program_id(0) % recipe.groups
    w_at = group * tile.n
    g_at = row_start(rows, n1, n2, g0, g1, g2, tile) + w_at
    x_at = row_start(rows, n1, n2, x0, x1, x2, tile) + w_at
    z_at = row_start(rows, n1, n2, z0, z1, z2, tile) + w_at if Z is not None else x_at
    lane = tl.arange(0, tile.block)[None, :]
    wait_for_producer(tile.pdl, True)
    mean = tl.zeros([1, 1], tl.float32)
    if not recipe.rms:  # any value near the row's mean serves as a first mean: here that of its first chunk
        begin = read_raw(Z + z_at + lane, lane < tile.n) if Z is not None else None
        mean = tl.sum(normed(read_raw(X + x_at + lane, lane < tile.n), begin, recipe), axis=1, keep_dims=True)
        mean = mean * (1.0 / min(tile.n, tile.block))
    sums = tl.zeros([1, tile.block], tl.float32)
    squares = tl.zeros([1, tile.block], tl.float32)
    gradients = tl.zeros([1, tile.block], tl.float32)
    products = tl.zeros([1, tile.block], tl.float32)
    for start in tl.range(0, tile.n, tile.block * UNROLL):
        for u in tl.static_range(UNROLL):
            cols = start + u * tile.block + lane
            mask = chunk_mask(cols, True, tile.n % (tile.block * UNROLL) != 0, False, tile.n)
            z = read_raw(Z + z_at + cols, mask) if Z is not None else None
            w = read_raw(W + w_at + cols, mask) if W is not None else None
            h = normed(read_raw(X + x_at + cols, mask), z, recipe)
            _, dw = reaching(read_raw(DY + g_at + cols, mask), z, w, recipe)
            if not recipe.rms:
                h = h - mean
                if mask is not None:
                    h = tl.where(mask, h, 0.0)
                sums += h
                gradients += dw
            squares += h * h
            products += dw * h
    release_consumer(tile.pdl, True)
    at = rows * recipe.groups + group
    if recipe.rms:
        total, product = tl.reduce((squares, products), 1, add_pairs, keep_dims=True)
        s, share = rms_statistics(total, product, eps, tile.n, recipe.l2)
    else:
        total, square, gradient, product = tl.reduce((sums, squares, gradients, products), 1, add_fours, keep_dims=True)
        left, s, shift, share = layer_statistics(total, square, gradient, product, eps, tile.n)
        tl.store(STATS + 2 * M * recipe.groups + at, shift)
        tl.store(STATS + 3 * M * recipe.groups + at, mean)
        tl.store(STATS + 4 * M * recipe.groups + at, left)
    tl.store(STATS + at, s)
    tl.store(STATS + M * recipe.groups + at, share)


@triton.jit(do_not_specialize=["M"])
def sum_kernel(
    PW, PB, DW, DB, M, eps, N: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """DW and DB = the sums of the M rows of PW and PB, rounded once. eps is unused: every launch has one."""
    PLACES: tl.constexpr = (N + COLUMNS - 1) // COLUMNS
    cols = tl.program_id(0) % PLACES * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    wait_for_producer(PDL, False)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    lost = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in tl.range(0, M, ROWS):
        rows = start + tl.arange(0, ROWS)[:, None]
        mask = (rows < M) & (cols < N)
        place = rows.to(tl.int64) * N + cols
        if PB is None:
            part = tl.load(PW + place, mask=mask, other=0.0)
        elif PW is None or tl.program_id(0) >= PLACES:
            part = tl.load(PB + place, mask=mask, other=0.0)
        else:
            part = tl.load(PW + place, mask=mask, other=0.0)
        total, lost = with_rows(total, lost, part, False, True)
    found = settled(*tl.reduce((total, lost), 0, add_exactly, keep_dims=True))
    if PB is None:
        tl.store(DW + cols, found.to(DW.dtype.element_ty), mask=cols < N)
    elif PW is None or tl.program_id(0) >= PLACES:
        tl.store(DB + cols, found.to(DB.dtype.element_ty), mask=cols < N)
    else:
        tl.store(DW + cols, found.to(DW.dtype.element_ty), mask=cols < N)
