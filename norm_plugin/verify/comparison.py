"""Compares two runs of one model, prompt by prompt and position by position, and judges the difference.

Two answers are compared up to and including the first token in which they differ: after it they answer different
questions. At each position both runs give the logprobs of their best tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

from norm_plugin.verify import rounding
from norm_plugin.verify.outcome import Answer

#: How far patched may exceed the floor, as of two runs that differ by chance one is always the larger. If stock is the
#: same twice, the floor is 0, and patched must be the same too.
MEAN_MARGIN, MAX_MARGIN = 1.5, 2.0

IDENTICAL, INSIDE, OUTSIDE = "identical", "inside the floor", "outside the floor"


@dataclass
class PromptDifference:
    """How two answers to one prompt differ. `deltas` has the largest difference of a logprob at each position."""

    prompt_tokens: int
    tokens: int
    diverged_at: int | None
    deltas: list[float]
    means: list[float]
    kl: float

    @property
    def mean(self) -> float:
        """The mean difference of a logprob, over the positions that differ at all.

        One other bit grows to the size of the dtype's rounding within a few layers. So the size of a difference tells a
        wrong norm from noise. The number of positions does not: another batch changes few of them, another kernel most.
        """
        return fmean(found) if (found := [mean for mean in self.means if mean > 0]) else 0.0

    @property
    def max(self) -> float:
        return max(self.deltas, default=0.0)

    @property
    def agreement(self) -> float:
        """The share of the compared positions at which both chose the same token."""
        return 1.0 if self.diverged_at is None else self.diverged_at / len(self.deltas)


@dataclass
class Difference:
    """How two runs of one model differ."""

    prompts: list[PromptDifference] = field(default_factory=list)

    @property
    def max(self) -> float:
        return max((p.max for p in self.prompts), default=0.0)

    @property
    def mean(self) -> float:
        """Over all positions that differ at all."""
        return fmean(found) if (found := [mean for p in self.prompts for mean in p.means if mean > 0]) else 0.0

    @property
    def kl(self) -> float:
        return fmean(p.kl for p in self.prompts) if self.prompts else 0.0

    @property
    def agreement(self) -> float:
        """The share of all compared positions at which both chose the same token."""
        positions = sum(len(p.deltas) for p in self.prompts)
        return sum(p.agreement * len(p.deltas) for p in self.prompts) / positions if positions else 1.0

    @property
    def diverged(self) -> int:
        return sum(p.diverged_at is not None for p in self.prompts)

    @property
    def identical(self) -> bool:
        """Every token and every logprob."""
        return self.max == 0 and self.diverged == 0


def compare(first: Sequence[Answer], second: Sequence[Answer]) -> Difference:
    """Two runs with the same prompts in the same order."""
    if [a.prompt for a in first] != [a.prompt for a in second]:
        raise ValueError("the two runs did not answer the same prompts.")
    return Difference([compare_answers(a, b) for a, b in zip(first, second, strict=True)])


def compare_answers(first: Answer, second: Answer) -> PromptDifference:
    pairs = zip(first.tokens, second.tokens, strict=True)
    diverged_at = next((i for i, (one, other) in enumerate(pairs) if one != other), None)
    compared = len(first.tokens) if diverged_at is None else diverged_at + 1
    positions = [logprob_deltas(first.top[i], second.top[i]) for i in range(compared)]
    return PromptDifference(
        len(first.prompt),
        len(first.tokens),
        diverged_at,
        [max(deltas) for deltas in positions],
        [fmean(deltas) for deltas in positions],
        fmean(kl(first.top[i], second.top[i]) for i in range(compared)) if positions else 0.0,
    )


def logprob_deltas(first: dict[str, float], second: dict[str, float]) -> list[float]:
    """How far the logprobs of the best tokens differ; a token that only one names is scored by a lower bound."""
    both = [abs(first[token] - second[token]) for token in first if token in second]
    only = [
        max(0.0, logprob - min(other.values()))
        for one, other in ((first, second), (second, first))
        for token, logprob in one.items()
        if token not in other
    ]
    return both + only


def kl(first: dict[str, float], second: dict[str, float]) -> float:
    """KL(first || second). Tokens that only one of them names count as one token, so it is a lower bound."""
    both = [token for token in first if token in second]
    p, q = ([math.exp(top[token]) for token in both] for top in (first, second))
    p.append(max(0.0, 1.0 - sum(p)))
    q.append(max(1e-12, 1.0 - sum(q)))
    return max(0.0, sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0))


def judge(floor: Difference, patched: Difference, step: float = 0.0) -> str:
    """Compare how patched differs from stock with how stock differs from itself.

    `step`: what one rounding can change if sums have another order; 0 if they have the same. Tokens need no rule of
    their own: another token is chosen only if the best two are closer than their logprobs differ.
    """
    if patched.identical:
        return IDENTICAL
    largest, mean = max(floor.max, step), max(floor.mean, step * rounding.MEAN)
    inside = patched.max <= MAX_MARGIN * largest and patched.mean <= MEAN_MARGIN * mean
    return INSIDE if inside else OUTSIDE
