"""What the kernels share: where a row lies, the gate, rounding to a quantised dtype, and the dependent launch."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from norm_plugin.kernels.constants import power_of_two


@triton.jit
def row_start(row, n1, n2, s0, s1, s2, tile: tl.constexpr):
    """The offset, in elements, of flat row number `row` in a tensor of 1 to 3 leading dimensions.

    n1 and n2 are the sizes of the second and third leading dimension; `tile.align` divides every stride.
    """
    if tile.levels == 1:
        start = row.to(tl.int64) * aligned(s0, tile.align)
    elif tile.levels == 2:
        start = (row // n1).to(tl.int64) * aligned(s0, tile.align)
        start += (row % n1).to(tl.int64) * aligned(s1, tile.align)
    else:
        start = (row // n2 // n1).to(tl.int64) * aligned(s0, tile.align)
        start += (row // n2 % n1).to(tl.int64) * aligned(s1, tile.align)
        start += (row % n2).to(tl.int64) * aligned(s2, tile.align)
    return start


@triton.jit
def aligned(stride, ALIGN: tl.constexpr):
    """A stride in 64 bits, which the compiler knows to be a multiple of ALIGN: so it reads rows in vectors."""
    wide = tl.multiple_of(stride.to(tl.int64), ALIGN)
    if stride.dtype == tl.int64:  # an argument: Triton forgets a multiple_of on one
        wide = stride // ALIGN * ALIGN
    return wide


@triton.jit
def wait_for_producer(PDL: tl.constexpr, LATE: tl.constexpr):
    """Before this, a kernel may read nothing, not even a weight, and write nothing."""
    if PDL:
        gdc_wait()
        if not LATE:
            gdc_launch_dependents()


@triton.jit
def release_consumer(PDL: tl.constexpr, LATE: tl.constexpr):
    """Lets the next kernel start. It waits until this one has finished and the writes are visible."""
    if PDL and LATE:
        gdc_launch_dependents()


@triton.jit
def add_pairs(a0, a1, b0, b1):
    """The sum of two pairs."""
    return a0 + b0, a1 + b1


@triton.jit
def mean_of(total, N: tl.constexpr):
    """total / N, as a product if that is exact."""
    return total * (1.0 / N) if N & (N - 1) == 0 else tl.div_rn(total, tl.zeros_like(total) + N)


@triton.jit
def chunk_mask(cols, in_batch, PARTIAL: tl.constexpr, MANY: tl.constexpr, N: tl.constexpr):
    """The mask of a chunk of `cols`. None if every lane is inside, because a masked load costs instructions."""
    if PARTIAL and MANY:
        mask = (cols < N) & in_batch
    elif PARTIAL:
        mask = cols < N
    elif MANY:
        mask = in_batch
    else:
        mask = None
    return mask


@triton.jit
def mask_of(c: tl.constexpr, lane, in_batch, MANY: tl.constexpr, tile: tl.constexpr):
    """The mask of chunk c, or None."""
    return chunk_mask(c * tile.block + lane, in_batch, c * tile.block + tile.block > tile.n, MANY, tile.n)


#: Whether a value should stay in the cache after it is read. 0 asks for neither.
KEEP, DROP = tl.constexpr(1), tl.constexpr(2)


@triton.jit
def read_raw(places, mask, STAY: tl.constexpr = 0):
    """Values in their own dtype, which takes half the registers of fp32; 0 where the mask is off."""
    if mask is None:
        x = tl.load(places)
    elif STAY == KEEP:
        x = tl.load(places, mask=mask, other=0.0, eviction_policy="evict_last")
    elif STAY == DROP:
        x = tl.load(places, mask=mask, other=0.0, eviction_policy="evict_first")
    else:
        x = tl.load(places, mask=mask, other=0.0)
    return x


@triton.jit
def read(places, mask, STAY: tl.constexpr = 0):
    """Values in fp32."""
    return read_raw(places, mask, STAY).to(tl.float32)


@triton.jit
def expect(P, at, first, tile: tl.constexpr):
    """Brings a weight or bias to the L2 cache during the wait, if it is read with the row. Only the first program asks:
    the requests of all would queue up. No value is read, because a preceding kernel may still be writing it."""
    if P is not None and tile.with_row and tile.pdl and first:
        LINE: tl.constexpr = 1024 // P.dtype.element_ty.primitive_bitwidth  # 128 bytes
        LINES: tl.constexpr = (power_of_two(tile.block * tile.chunks) + LINE - 1) // LINE
        places = P + at + tl.minimum(tl.arange(0, LINES) * LINE, tile.n - 1)[None, :]
        asm: tl.constexpr = "prefetch.global.L2 [$1]; // $0"
        tl.inline_asm_elementwise(asm, "=r,l", [places.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def read_with_row(P, at, lane, tile: tl.constexpr):
    """All chunks of a weight or bias that is read with the row, so that they arrive while the row is summed."""
    chunks = ()
    if P is not None and tile.with_row:
        for c in tl.static_range(tile.chunks):
            mask = mask_of(c, lane, True, False, tile)
            chunks += (tl.load(P + at + c * tile.block + lane, mask=mask, eviction_policy="evict_last"),)
    return chunks


@triton.jit
def by_column(P, at, chunks, c: tl.constexpr, lane, tile: tl.constexpr):
    """Chunk c of a weight or bias: from `chunks` if it was read with the row, else read now. None without a weight."""
    if P is None:
        w = None
    elif tile.with_row:
        w = chunks[c]
    else:
        cols = c * tile.block + lane  # added to the address as a whole: in parts it takes eight registers more
        w = read(P + at + cols, mask_of(c, lane, True, False, tile))
    return w


@triton.jit
def gate(z, SIGMOID: tl.constexpr):
    """act(z) in fp32: sigmoid, or silu."""
    s = tl.sigmoid(z)
    return s if SIGMOID else z * s


@triton.jit
def quotient(y, inverse, by, FP8_UNIT: tl.constexpr):
    """y / by, correctly rounded; `inverse` is 1 / by, correctly rounded.

    A division takes a dozen instructions. A product and one Newton step with fused multiply-adds give the same bits in
    four (Markstein, IBM J. Res. Dev. 34, 1990). If an infinity makes the step NaN, the product is the quotient.
    """
    if FP8_UNIT:
        near = y * inverse
        better = tl.fma(tl.fma(-near, by + tl.zeros_like(y), y), inverse + tl.zeros_like(y), near)
        result = tl.where(better == better, better, near)
    else:
        result = tl.div_rn(y, by + tl.zeros_like(y))
    return result


@triton.jit
def cast(y, QMAX: tl.constexpr, dtype: tl.constexpr, FP8_UNIT: tl.constexpr):
    """y rounded to nearest even and saturated to an fp8 dtype or int8. NaN stays NaN if the dtype has one.

    FP8_UNIT: the GPU converts to fp8 and saturates in one instruction.
    """
    if dtype == tl.int8:
        y = tl.minimum(tl.maximum(y, -128.0), 127.0)
        y = (y + 12582912.0) - 12582912.0  # 1.5 * 2^23: fp32 has no fraction bits there, so the sum rounds
    elif not FP8_UNIT:
        y = tl.clamp(y, -QMAX, QMAX, propagate_nan=tl.PropagateNan.ALL)
    return y.to(dtype)


@triton.jit
def larger(a, b):
    """max(a, b), NaN if either is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def largest_of(y, axis: tl.constexpr):
    """The largest magnitude along an axis, which is kept; NaN if one value is."""
    return tl.reduce(tl.abs(y), axis, larger, keep_dims=True)
