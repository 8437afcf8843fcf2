"""Kernels that make the mistakes of a norm show: they let it start before they write, and spoil what it leaves."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait, globaltimer

#: A NaN in fp32, and two in bf16 and fp16.
POISON = tl.constexpr(0x7FF07FF0)


@triton.jit(do_not_specialize=["size", "delay"])
def produce(FROM, TO, size, delay, BLOCK: tl.constexpr):
    """TO = FROM, but late: lets the next kernel start first, and then waits for `delay` ns."""
    gdc_wait()
    gdc_launch_dependents()
    begin = globaltimer()
    while globaltimer() - begin < delay:
        pass
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(TO + at, tl.load(FROM + at, mask=at < size), mask=at < size)


@triton.jit
def bystand(BLOCK: tl.constexpr):
    """Does nothing, and lets the next kernel start before it has waited for the one before."""
    gdc_launch_dependents()
    gdc_wait()


@triton.jit(do_not_specialize=["size"])
def consume(FOUND, EXPECTED, WRONG, size, BLOCK: tl.constexpr):
    """Count the words of FOUND that differ from EXPECTED, and poison them."""
    gdc_launch_dependents()
    gdc_wait()
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    differs = tl.load(FOUND + at, mask=at < size) != tl.load(EXPECTED + at, mask=at < size)
    tl.atomic_add(WRONG, tl.sum((differs & (at < size)).to(tl.int64)))
    tl.store(FOUND + at, tl.full([BLOCK], POISON, tl.int32), mask=at < size)


@triton.jit(do_not_specialize=["size"])
def hasty_copy(FROM, TO, size, BLOCK: tl.constexpr):
    """TO = FROM, read before the wait: the mistake that the tests must find."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(FROM + at, mask=at < size)
    gdc_wait()
    gdc_launch_dependents()
    tl.store(TO + at, x, mask=at < size)
