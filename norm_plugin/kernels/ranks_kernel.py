"""The kernel across ranks: all-reduce, residual add and norm in one, in a fixed order.

A program has a *channel*, which it shares with the same program of every other rank: three buffers that take turns,
each with a slot for every rank, and one for a sum. One row is one *round* of a channel:

- A rank stores its part of the row into its slot of every rank's buffer, and waits until the slots of all ranks are
  full in its own. With `two_shot` it stores the part with the row's owner alone (rank row % size), who stores the
  rounded sum into every rank's slot for it: there is less to send, and one more hop to wait for.
- The sum is of ranks 0 to size - 1, in fp32, and rounded once. What follows is the norm, on every rank.
- The buffer of the round before is emptied. It is next written in the next round but one. No rank can be there yet:
  it would have finished the next round, for which this rank sends what it sends after this one.

STATE says of each channel which buffer is next, how many bytes of a slot the last round took, and whether that was of
two shots. It lies in device memory, so a captured graph may be replayed at any time, and a channel may see rows of any
width in turns.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from norm_plugin.kernels.common import (
    by_column,
    mask_of,
    mean_of,
    read_raw,
    read_with_row,
    release_consumer,
    wait_for_producer,
)
from norm_plugin.kernels.constants import constants, power_of_two
from norm_plugin.kernels.rms_kernel import scale, sum_of
from norm_plugin.kernels.words import EMPTY, as_words, elements, fence, load, sendable, store, wait

BUFFERS = tl.constexpr(3)


@constants
class Exchange(NamedTuple):
    """How rows are exchanged: among `size` ranks, in chunks of `lanes` vectors, of which `at_once` are waited for at
    once, for so many `seconds` at most."""

    size: int
    two_shot: bool
    lanes: int
    at_once: int
    seconds: int


@triton.jit
def inverse_rms(held, eps, tile: tl.constexpr, exchange: tl.constexpr):
    """What a row in chunks is scaled by.

    Squares are added up in an order that follows from the width alone, however many lanes a chunk has: those of a
    vector, then of 32 vectors (a warp's), and these in halves, the first half to the second. So the number of rows may
    choose the lanes.
    """
    WARPS: tl.constexpr = exchange.lanes // 32
    sums = ()
    for c in tl.static_range(tile.chunks):
        sums += (tl.sum(tl.reshape(held[c] * held[c], [WARPS, tile.block // WARPS]), axis=1),)
    total = tl.sum(in_halves(sums), axis=0)
    return tl.rsqrt(mean_of(tl.zeros([1, 1], tl.float32) + total, tile.n) + eps)


@triton.jit
def in_halves(sums):
    """The sum of chunks: of the first half with the second half, and so on. What is missing to a power of two is 0."""
    if len(sums) == 1:
        total = sums[0]
    else:
        HALF: tl.constexpr = power_of_two(len(sums)) // 2
        first = ()
        for i in tl.static_range(HALF):
            first += (sums[i] + sums[HALF + i],) if HALF + i < len(sums) else (sums[i],)
        total = in_halves(first)
    return total


@triton.jit
def sum_of_parts(words, inside, dtype: tl.constexpr, tile: tl.constexpr,
                 exchange: tl.constexpr):  # fmt: skip
    """The sum of parts, in this order, rounded once: four words each. Zero is +0."""
    total = tl.zeros([1, tile.block], tl.float32)
    for at in tl.static_range(0, len(words), 4):
        w = words[at : at + 4]
        if inside is not None:
            w = (only(w[0], inside), only(w[1], inside), only(w[2], inside), only(w[3], inside))
        total += elements(w[0], w[1], w[2], w[3], dtype, exchange.lanes).to(tl.float32)
    return (total.to(dtype).to(tl.float32) + 0.0).to(dtype)


@triton.jit
def only(word, inside):
    """A word, 0 beyond the row."""
    return tl.where(inside, word, 0)


@triton.jit
def receive(slots, own, status, first: tl.constexpr, COUNT: tl.constexpr, dtype: tl.constexpr, tile: tl.constexpr,
            exchange: tl.constexpr):  # fmt: skip
    """The sums of COUNT chunks from the first on."""
    VECTORS: tl.constexpr = tile.n * dtype.primitive_bitwidth // 128
    places = ()
    for q in tl.static_range(len(slots)):
        for c in tl.static_range(COUNT):
            vector = (first + c) * exchange.lanes + tl.arange(0, exchange.lanes)
            places += (slots[q] + tl.minimum(vector, VECTORS - 1).to(tl.int64) * 16,)
    words = wait(places, status, len(slots), exchange.seconds)
    chunks = ()
    for c in tl.static_range(COUNT):
        parts = ()
        for q in tl.static_range(len(slots)):
            parts += words[4 * (q * COUNT + c) : 4 * (q * COUNT + c) + 4]
        if len(own) > 0:
            parts += own[4 * (first + c) : 4 * (first + c) + 4]
        if (first + c + 1) * exchange.lanes > VECTORS:
            inside = (first + c) * exchange.lanes + tl.arange(0, exchange.lanes) < VECTORS
            chunks += (sum_of_parts(parts, inside, dtype, tile, exchange),)
        else:
            chunks += (sum_of_parts(parts, None, dtype, tile, exchange),)
    return chunks


@triton.jit
def received(slots, own, status, dtype: tl.constexpr, tile: tl.constexpr, exchange: tl.constexpr):
    """The sum of the slots, in their order, and of the own part where it was kept, in chunks."""
    WHOLE: tl.constexpr = tile.chunks // exchange.at_once * exchange.at_once
    chunks = ()
    for first in tl.static_range(0, WHOLE, exchange.at_once):
        chunks += receive(slots, own, status, first, exchange.at_once, dtype, tile, exchange)
    if tile.chunks > WHOLE:
        chunks += receive(slots, own, status, WHOLE, tile.chunks - WHOLE, dtype, tile, exchange)
    return chunks


@triton.jit(do_not_specialize=["M", "rank", "channels", "row_bytes"])
def ranks_kernel(
    X, R, V, W, Y, T, PEERS, STATE, M, rank, channels, row_bytes, eps,
    tile: tl.constexpr, recipe: tl.constexpr, exchange: tl.constexpr,
):  # fmt: skip
    """Y = norm(sum of X [+ R]), T = sum of X + R; with V, the sum is normed by it and rounded before the add."""
    dtype: tl.constexpr = X.dtype.element_ty
    VECTORS: tl.constexpr = tile.n * (dtype.primitive_bitwidth // 8) // 16
    KEEP_OWN: tl.constexpr = exchange.size == 2 and not exchange.two_shot  # of two parts the order changes nothing
    channel = tl.program_id(0)
    lanes = tl.arange(0, exchange.lanes)
    lane = tl.arange(0, tile.block)[None, :]
    wait_for_producer(tile.pdl, tile.late)

    state = tl.load(STATE + channel)
    status = tl.load(PEERS + exchange.size)
    here = tl.load(PEERS + rank)
    turn = (state >> 32 & 3).to(tl.int32)
    all_used = state >> 34 != 0
    used = (state & 0xFFFFFFFF).to(tl.int32)
    rounds = tl.cdiv(M - channel, tl.num_programs(0))
    for i in tl.range(0, rounds):
        row = channel + i * tl.num_programs(0)
        buffer = (turn * channels + channel).to(tl.int64) * (exchange.size + 1) * row_bytes
        before = (tl.where(turn == 0, 2, turn - 1) * channels + channel).to(tl.int64) * (exchange.size + 1) * row_bytes
        own = rank.to(tl.int64) * row_bytes
        owner = row % exchange.size

        kept = ()
        at = X.to(tl.int64) + row.to(tl.int64) * VECTORS * 16
        for c in tl.static_range(tile.chunks):
            vector = c * exchange.lanes + lanes
            inside = vector < VECTORS
            place = tl.minimum(vector, VECTORS - 1).to(tl.int64) * 16
            w0, w1, w2, w3 = load(at + place, inside)
            w0, w1, w2, w3 = sendable(w0), sendable(w1), sendable(w2), sendable(w3)
            if KEEP_OWN:
                kept += (w0, w1, w2, w3)
                store(tl.load(PEERS + 1 - rank) + buffer + own + place, w0, w1, w2, w3, inside)
            elif exchange.two_shot:
                store(tl.load(PEERS + owner) + buffer + own + place, w0, w1, w2, w3, inside)
            else:
                for step in tl.static_range(1, exchange.size + 1):  # this rank's own slot is the last
                    there = tl.load(PEERS + (rank + step) % exchange.size)
                    store(there + buffer + own + place, w0, w1, w2, w3, inside)

        rs = ()
        if R is not None:
            for c in tl.static_range(tile.chunks):
                mask = mask_of(c, lane, True, False, tile)
                rs += (read_raw(R + row.to(tl.int64) * tile.n + c * tile.block + lane, mask),)
        weights = read_with_row(W, 0, lane, tile)

        empty = tl.full([exchange.lanes], EMPTY, tl.int32)
        for start in tl.range(0, used, exchange.lanes * 16):
            byte = start + lanes * 16
            for q in tl.static_range(exchange.size + 1):
                filled = (byte < used) & (all_used | (q < exchange.size and not (KEEP_OWN and q == rank)))
                store(here + before + q * row_bytes + byte, empty, empty, empty, empty, filled)

        slots = ()
        if KEEP_OWN:
            slots += (here + buffer + (1 - rank) * row_bytes,)
            expected = status + 4 * (1 - rank)
        else:
            expected = status
            for q in tl.static_range(exchange.size):
                slots += (here + buffer + q * row_bytes,)
        if exchange.two_shot:
            result = exchange.size * row_bytes
            if owner == rank:
                totals = received(slots, kept, expected, dtype, tile, exchange)
                fence(lanes)  # what others have emptied is seen before they get the sum
                for c in tl.static_range(tile.chunks):
                    vector = c * exchange.lanes + lanes
                    w0, w1, w2, w3 = as_words(totals[c], exchange.lanes)
                    w0, w1, w2, w3 = sendable(w0), sendable(w1), sendable(w2), sendable(w3)
                    for step in tl.static_range(1, exchange.size + 1):
                        there = tl.load(PEERS + (rank + step) % exchange.size) + buffer + result
                        store(there + vector.to(tl.int64) * 16, w0, w1, w2, w3, vector < VECTORS)
            slots = (here + buffer + result,)
            expected = status + 4 * owner  # or a rank that the owner waits for
        xs = received(slots, kept, expected, dtype, tile, exchange)

        if V is not None:
            wide = ()
            for c in tl.static_range(tile.chunks):
                wide += (xs[c].to(tl.float32),)
            s = inverse_rms(wide, eps, tile, exchange)
            posts = ()
            for c in tl.static_range(tile.chunks):
                v = tl.load(V + c * tile.block + lane, mask=mask_of(c, lane, True, False, tile))
                posts += (scale(wide[c], s, v, dtype, recipe).to(dtype),)
            xs = posts
        varied = ()
        held = ()
        for c in tl.static_range(tile.chunks):
            if R is not None:
                total, rounded = sum_of(xs[c], rs[c])
                mask = mask_of(c, lane, True, False, tile)
                tl.store(
                    T + row.to(tl.int64) * tile.n + c * tile.block + lane, rounded.to(T.dtype.element_ty), mask=mask
                )
                held += ((rounded if recipe.output_of_rounded_sum else total),)
                varied += ((rounded if recipe.variance_of_rounded_sum else total),)
            else:
                held += (xs[c].to(tl.float32),)
                varied += (xs[c].to(tl.float32),)
        release_consumer(tile.pdl, tile.late)
        s = inverse_rms(varied, eps, tile, exchange)
        for c in tl.static_range(tile.chunks):
            w = by_column(W, 0, weights, c, lane, tile)
            y = scale(held[c], s, w, dtype, recipe)
            mask = mask_of(c, lane, True, False, tile)
            tl.store(Y + row.to(tl.int64) * tile.n + c * tile.block + lane, y.to(dtype), mask=mask)

        turn = tl.where(turn == 2, 0, turn + 1)
        used = VECTORS * 16
        all_used = exchange.two_shot
        if i + 1 < rounds:  # what was emptied is seen before what this thread sends in the next round
            fence(lanes)
    TWO_SHOT: tl.constexpr = 4 if exchange.two_shot else 0
    tl.store(STATE + channel, ((turn + TWO_SHOT).to(tl.int64) << 32) | used)
