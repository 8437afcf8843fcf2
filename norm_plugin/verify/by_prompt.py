"""The table of one model, with a row for each prompt, that verify shows in the terminal and on the page."""

from __future__ import annotations

from collections.abc import Iterator

from norm_plugin.verify.verdict import Verdict

HEADINGS = (
    "prompt", "tokens in", "out", "first other token", "top-1", "max |Δ|", "mean |Δ|", "KL", "floor max |Δ|",
)  # fmt: skip


def rows(verdict: Verdict) -> Iterator[tuple[str, ...]]:
    """The rows below the headings."""
    for i, (patched, floor) in enumerate(zip(verdict.patched.prompts, verdict.floor.prompts, strict=True), 1):
        where = "none" if patched.diverged_at is None else str(patched.diverged_at + 1)
        numbers = (number(x) for x in (patched.max, patched.mean, patched.kl, floor.max))
        yield str(i), str(patched.prompt_tokens), str(patched.tokens), where, f"{patched.agreement:.0%}", *numbers


def number(x: float) -> str:
    """The number with two digits; 0 as "0"."""
    return "0" if x == 0 else f"{x:.1e}"
