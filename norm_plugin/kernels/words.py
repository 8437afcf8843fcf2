"""A row as words of 32 bits, in vectors of 16 bytes: how ranks give rows to each other.

A word that holds EMPTY has not come yet. As a number EMPTY is -0.0 (in fp32), or +0.0 and -0.0 (two of 16 bits), so a
sum that begins with +0.0 is the same where 0 is sent in its place. Every word says itself whether it is there: no
flag follows the data, and nothing depends on the order in which words arrive.

The interpreter knows no assembly, and takes plain loads and stores instead.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from norm_plugin.kernels import interpreted

EMPTY = tl.constexpr(-(2**31))

WORDS = 4  # a vector

#: How often a kernel looks for a rank before it asks for the time; and how long it lives on once it has given up, so
#: that the host can read for whom it has waited.
LOOKS = 65536
LAST_SECONDS = 2

#: How often the interpreter looks.
MOST_LOOKS = tl.constexpr(200_000)

PLAIN = tl.constexpr(interpreted())

_LOAD = tl.constexpr("ld.global.v4.b32 {$0, $1, $2, $3}, [$4];")
_STORE = tl.constexpr(
    "{ .reg .pred p; setp.ne.b32 p, $6, 0; @p st.volatile.global.v4.b32 [$1], {$2, $3, $4, $5}; mov.b32 $0, 0; }"
)
_FENCE = tl.constexpr("fence.acq_rel.sys; mov.b32 $0, 0;")


@triton.jit
def load(places, mask):
    """Four words of each place (an address), which lies in memory wherever the mask is off."""
    if PLAIN:
        p = places.to(tl.pointer_type(tl.int32))
        words = (
            tl.load(p, mask=mask, other=0),
            tl.load(p + 1, mask=mask, other=0),
            tl.load(p + 2, mask=mask, other=0),
            tl.load(p + 3, mask=mask, other=0),
        )
    else:
        words = tl.inline_asm_elementwise(
            _LOAD, "=r,=r,=r,=r,l", [places], dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=False, pack=1
        )
    return words


@triton.jit
def store(places, w0, w1, w2, w3, mask):
    """Give four words to each place, for all ranks to see."""
    if PLAIN:
        p = places.to(tl.pointer_type(tl.int32))
        tl.store(p, w0, mask=mask)
        tl.store(p + 1, w1, mask=mask)
        tl.store(p + 2, w2, mask=mask)
        tl.store(p + 3, w3, mask=mask)
    else:
        args = [places, w0, w1, w2, w3, mask.to(tl.int32)]
        tl.inline_asm_elementwise(_STORE, "=r,l,r,r,r,r,r", args, dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def fence(lanes):
    """What this thread has written is seen before what it writes from now on, by all ranks."""
    if not PLAIN:
        tl.inline_asm_elementwise(_FENCE, "=r,r", [lanes], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def sendable(word):
    """A word that never reads as EMPTY."""
    return tl.where(word == EMPTY, 0, word)


@triton.jit
def wait(places, status, RANKS: tl.constexpr, SECONDS: tl.constexpr):
    """The words of several places, once all of them are there: four after four, in the order of the places, which are
    those of rank 0, then those of rank 1, and so on.

    A rank that does not come in SECONDS ends the kernel, and with it the CUDA context. `status` takes which it was.
    """
    if PLAIN:
        missing = 1
        looks = 0
        while missing > 0:
            missing = 0
            for i in tl.static_range(len(places)):
                p = places[i].to(tl.pointer_type(tl.int32))
                for w in tl.static_range(4):
                    missing += tl.sum((tl.load(p + w, volatile=True) == EMPTY).to(tl.int32))
            looks += 1
            tl.device_assert(looks < MOST_LOOKS, "a rank did not come")
        words = ()
        for i in tl.static_range(len(places)):
            p = places[i].to(tl.pointer_type(tl.int32))
            words += (tl.load(p), tl.load(p + 1), tl.load(p + 2), tl.load(p + 3))
    else:
        args = places + (status + tl.zeros_like(places[0]),)  # noqa: RUF005 - Triton 3.6 knows no star
        code: tl.constexpr = waiting(RANKS, len(places), SECONDS)
        operands: tl.constexpr = operands_of(len(places))
        types: tl.constexpr = types_of(len(places))
        words = tl.inline_asm_elementwise(code, operands, args, dtype=types, is_pure=False, pack=1)
    return words


@triton.constexpr_function
def types_of(places: int) -> Any:
    """The words of the places."""
    return (tl.int32,) * (WORDS * places)


@triton.constexpr_function
def operands_of(places: int) -> str:
    """Words that come, and addresses. A word may not take the register of an address, which is read again."""
    return ",".join(["=&r"] * (WORDS * places) + ["l"] * (places + 1))


@triton.constexpr_function
def waiting(ranks: int, places: int, seconds: int) -> str:
    """The assembly of `wait`. All loads are under way before the first is looked at."""
    words = WORDS * places
    status = f"${words + places}"
    loads = [
        f"ld.volatile.global.v4.b32 {{{', '.join(f'${WORDS * i + w}' for w in range(WORDS))}}}, [${words + i}];"
        for i in range(places)
    ]
    looked = []
    for q in range(ranks):
        first, *others = range(words // ranks * q, words // ranks * (q + 1))
        looked.append(f"setp.eq.s32 gone{q}, ${first}, {EMPTY.value};")
        looked += [f"setp.eq.or.s32 gone{q}, ${w}, {EMPTY.value}, gone{q};" for w in others]
    lines = [
        "{ .reg .pred gone, ask, late;",
        *[f".reg .pred gone{q};" for q in range(ranks)],
        ".reg .u32 looks, some; .reg .u64 begin, now; mov.u32 looks, 0; mov.u64 begin, 0;",
        "LOOK:",
        *loads,
        *looked,
        "mov.pred gone, gone0;",
        *[f"or.pred gone, gone, gone{q};" for q in range(1, ranks)],
        "@!gone bra THERE;",
        f"add.u32 looks, looks, 1; and.b32 some, looks, {LOOKS - 1}; setp.ne.u32 ask, some, 0; @ask bra LOOK;",
        "mov.u64 now, %globaltimer; setp.eq.u64 ask, begin, 0; selp.u64 begin, now, begin, ask;",
        f"sub.u64 now, now, begin; setp.lt.u64 late, now, {int(seconds) * 10**9}; @late bra LOOK;",
        *[f"@gone{q} st.volatile.global.u32 [{status} + {4 * q}], 1;" for q in range(ranks)],
        f"fence.acq_rel.sys; mov.u64 begin, %globaltimer; add.u64 begin, begin, {LAST_SECONDS * 10**9};",
        "LEAVE: mov.u64 now, %globaltimer; setp.lt.u64 late, now, begin; @late bra LEAVE; trap;",
        "THERE: }",
    ]
    return "\n".join(lines)


@triton.jit
def elements(w0, w1, w2, w3, dtype: tl.constexpr, LANES: tl.constexpr):
    """The numbers that LANES vectors of four words hold, as one row [1, columns]."""
    four = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [LANES, 2, 2], in the order of the words
    if dtype.primitive_bitwidth == 32:
        row = tl.reshape(four, [1, LANES * 4]).to(dtype, bitcast=True)
    else:
        halves = tl.join(four.to(tl.int16), (four >> 16).to(tl.int16))
        row = tl.reshape(halves, [1, LANES * 8]).to(dtype, bitcast=True)
    return row


@triton.jit
def as_words(row, LANES: tl.constexpr):
    """The four words of each vector of a row [1, columns]: the reverse of `elements`."""
    if row.dtype.primitive_bitwidth == 32:
        four = tl.reshape(row.to(tl.int32, bitcast=True), [LANES, 2, 2])
    else:
        low, high = tl.split(tl.reshape(row.to(tl.int16, bitcast=True), [LANES, 2, 2, 2]))
        four = (high.to(tl.int32) << 16) | (low.to(tl.int32) & 0xFFFF)
    even, odd = tl.split(four)  # words 0 and 2, 1 and 3
    w0, w2 = tl.split(even)
    w1, w3 = tl.split(odd)
    return w0, w1, w2, w3
