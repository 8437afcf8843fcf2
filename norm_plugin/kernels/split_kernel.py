"""The kernel of rows that lie in parts on several ranks: sums of squares, or the norm from the sums of whole rows."""

from __future__ import annotations

import triton
import triton.language as tl

from norm_plugin.kernels.common import (
    DROP,
    KEEP,
    chunk_mask,
    expect,
    mean_of,
    read,
    read_with_row,
    release_consumer,
    row_start,
    wait_for_producer,
)
from norm_plugin.kernels.gated_kernel import finish, load_gated


@triton.jit(do_not_specialize=["M", "n1", "n2", "x0", "x1", "x2", "z0", "z1", "z2", "y0", "y1", "y2"])
def split_kernel(
    X, Z, W, S, Y, M, n1, n2, x0, x1, x2, z0, z1, z2, y0, y1, y2, eps,
    N: tl.constexpr, FULL: tl.constexpr, POWER: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
    UNROLL: tl.constexpr, HELD: tl.constexpr, WITH_ROW: tl.constexpr, ROWS: tl.constexpr, LEVELS: tl.constexpr,
    ALIGN: tl.constexpr, PDL: tl.constexpr, LATE: tl.constexpr,
    GATED: tl.constexpr, HAS_WEIGHT: tl.constexpr, HF: tl.constexpr,
):  # fmt: skip
    """S = sums of squares of ROWS rows of width N; or, where there is a Y, Y = their norm, S those of FULL columns."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    in_batch = row < M
    row = tl.minimum(row, M - 1)
    x_at = row_start(row, n1, n2, x0, x1, x2, LEVELS, ALIGN)
    z_at = row_start(row, n1, n2, z0, z1, z2, LEVELS, ALIGN) if GATED else x_at
    lane = tl.arange(0, BLOCK)[None, :]
    AGAIN: tl.constexpr = CHUNKS - HELD  # whole chunks, a few of them at a time; the others all at once
    if WITH_ROW and HAS_WEIGHT:
        expect(W, 0, tl.program_id(0) == 0, N, POWER, PDL)
    wait_for_producer(PDL, LATE)

    if Y is None:
        squares = tl.zeros([ROWS, BLOCK], tl.float32)
        if AGAIN > 0:
            for start in tl.range(0, AGAIN, UNROLL):
                for u in tl.static_range(UNROLL):
                    cols = (start + u) * BLOCK + lane
                    inside = (cols < AGAIN * BLOCK) & in_batch
                    h = load_gated(X, Z, x_at, z_at, cols, inside, GATED, False, KEEP)
                    squares += h * h
        for c in tl.static_range(AGAIN, CHUNKS):
            cols = c * BLOCK + lane
            mask = chunk_mask(cols, in_batch, c * BLOCK + BLOCK > N, ROWS > 1, N)
            h = load_gated(X, Z, x_at, z_at, cols, mask, GATED, False)
            squares += h * h
        release_consumer(PDL, LATE)
        tl.store(S + row, tl.sum(squares, axis=1, keep_dims=True), mask=in_batch)
    else:
        dtype: tl.constexpr = X.dtype.element_ty
        y_at = row_start(row, n1, n2, y0, y1, y2, LEVELS, ALIGN)
        s = tl.rsqrt(mean_of(tl.load(S + row), FULL) + eps)
        # All that the held chunks need is asked for before the first store: no load is moved across one.
        held = ()
        for c in tl.static_range(AGAIN, CHUNKS):
            cols = c * BLOCK + lane
            mask = chunk_mask(cols, in_batch, c * BLOCK + BLOCK > N, ROWS > 1, N)
            held += (load_gated(X, Z, x_at, z_at, cols, mask, GATED, False),)
        weights = ()
        if WITH_ROW and HAS_WEIGHT:
            weights = read_with_row(W, 0, lane, in_batch, N, BLOCK, CHUNKS)
        release_consumer(PDL, LATE)
        for c in tl.static_range(AGAIN, CHUNKS):
            cols = c * BLOCK + lane
            mask = chunk_mask(cols, in_batch, c * BLOCK + BLOCK > N, ROWS > 1, N)
            w = None
            if HAS_WEIGHT:
                in_row = chunk_mask(cols, in_batch, c * BLOCK + BLOCK > N, False, N)
                w = weights[c] if WITH_ROW else read(W + cols, in_row)
            y = finish(held[c - AGAIN] * s, w, None, None, dtype, HAS_WEIGHT, False, False, False, HF)
            tl.store(Y + y_at + cols, y.to(dtype), mask=mask)
        if AGAIN > 0:
            for start in tl.range(0, AGAIN, UNROLL):
                for u in tl.static_range(UNROLL):
                    cols = (start + u) * BLOCK + lane
                    whole = cols < AGAIN * BLOCK
                    inside = whole & in_batch
                    h = load_gated(X, Z, x_at, z_at, cols, inside, GATED, False, DROP)
                    weight = read(W + cols, whole, KEEP) if HAS_WEIGHT else None
                    y = finish(h * s, weight, None, None, dtype, HAS_WEIGHT, False, False, False, HF)
                    tl.store(Y + y_at + cols, y.to(dtype), mask=inside)
