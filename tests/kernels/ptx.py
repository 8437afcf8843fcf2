"""Reads from PTX what a kernel does: its parameters, its accesses to memory by parameter, its arithmetic."""

from __future__ import annotations

import re
from dataclasses import dataclass

#: Sizes of parameters in bytes, by the kind that PTX declares.
SIZES = {"u64": 8, "b64": 8, "u32": 4, "s32": 4, "b32": 4, "f32": 4}

PARAMETER = re.compile(r"\.param \.(\w+) (?:\.ptr [^_]*)?\w+_param_(\d+)")
FROM_PARAMETER = re.compile(r"ld\.param\.\w+\s+(%\w+), \[\w+_param_(\d+)\]")
ACCESS = re.compile(r"\b(ld|st|atom|red)\.global([.:\w]*)\s+(.*)")
COPY = re.compile(r"\bcp\.async\.\w+\.shared\.global[.:\w]*\s+\[[^]]*\],\s*\[\s*(%\w+)[^]]*\],\s*(\w+)")
ADDRESS = re.compile(r"\[\s*(%\w+)")
REGISTER = re.compile(r"%\w+")
ARITHMETIC = re.compile(r"\b(add|sub|mul|fma|mad|div|min|max|neg|abs|ex2|tanh|rcp|sqrt)\.([.\w]*)")
NARROW = {"f16", "bf16", "f16x2", "bf16x2", "f64"}
SAME_BITS = {"add", "sub", "mul", "min", "max", "neg", "abs"}


@dataclass(frozen=True)
class Access:
    """A load or store of global memory: its parameter, its bytes, and its side of the wait."""

    store: bool
    parameter: int
    bytes: int
    before_wait: bool


def parameters(ptx: str) -> list[int]:
    """The sizes of the kernel's parameters, in order."""
    header = ptx[ptx.index(".entry") : ptx.index(".reqntid")]
    return [SIZES[kind] for kind, _ in PARAMETER.findall(header)]


def accesses(ptx: str) -> list[Access]:
    """Every access in the order of the text.

    Follows registers back to the parameters that they are made of: an address is one pointer, plus offsets that are
    made of integers. A register that is written twice (in a loop) keeps its earlier origins.
    """
    pointers = {number for number, size in enumerate(parameters(ptx)) if size == 8}
    made_of: dict[str, set[int]] = {}
    found, waited = [], "griddepcontrol.wait" not in ptx
    for line in ptx.splitlines():
        statement = line.split("//")[0].strip()
        if "griddepcontrol.wait" in statement:
            waited = True
        elif match := FROM_PARAMETER.search(statement):
            made_of[match[1]] = {int(match[2])} & pointers
        elif match := ACCESS.search(statement):
            address = ADDRESS.search(match[3])
            assert address is not None, statement
            found += through(made_of[address[1]], match[1] != "ld", width(match[2]), not waited)
        elif match := COPY.search(statement):
            found += through(made_of[match[1]], False, int(match[2], 0), not waited)
        elif statement.startswith(("@", "{")) or not statement.startswith((".", "$", "bra", "bar")):
            registers = REGISTER.findall(statement)
            if len(registers) > 1:
                sources = set().union(*(made_of.get(register, set()) for register in registers[1:]))
                made_of.setdefault(registers[0], set()).update(sources)
    return found


def through(made_of: set[int], store: bool, size: int, before_wait: bool) -> list[Access]:
    """An access through one parameter, or through one of several where a kernel selects."""
    assert made_of
    return [Access(store, parameter, size, before_wait) for parameter in sorted(made_of)]


def width(suffix: str) -> int:
    """The bytes of one access, as in .L1::evict_last.v4.b32."""
    vector = re.search(r"\.v(\d)", suffix)
    kind = re.search(r"\.[bsuf](\d+)$", suffix)
    assert kind is not None, suffix
    return int(kind[1]) // 8 * (int(vector[1]) if vector else 1)


def narrow_arithmetic(ptx: str) -> list[str]:
    """Arithmetic in less than fp32 whose result differs from that in fp32.

    A sum or product of two 16-bit values that is rounded to 16 bits at once has the bits of one that is rounded to fp32
    in between, because fp32 has more than two digits beyond twice theirs; LLVM uses this. Blackwell's fused
    multiply-add takes 16-bit factors into an fp32 sum.
    """
    found = []
    for name, suffix in ARITHMETIC.findall(ptx):
        kinds = set(suffix.split("."))
        harmless = "f32" in kinds or (name in SAME_BITS and "f64" not in kinds)
        if kinds & NARROW and not harmless:
            found.append(f"{name}.{suffix}")
    return found
