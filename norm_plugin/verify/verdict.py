"""What verify says of one model: how patched differs from stock, what stock does to itself, and who normalized."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from norm_plugin.verify.comparison import IDENTICAL, INSIDE, OUTSIDE, Difference, compare, judge
from norm_plugin.verify.outcome import Outcome

INERT = "nothing was patched"


@dataclass
class Verdict:
    """One model."""

    model: str
    floor: Difference
    patched: Difference
    verdict: str
    taken: list[str]
    others: list[str]
    backends: list[str]
    numerics: list[str]
    kept: dict[str, list[str]]
    silent: list[str]
    missing: dict[str, str]

    @property
    def passed(self) -> bool:
        """Whether this model may be served patched."""
        return self.verdict in (IDENTICAL, INSIDE)

    def as_json(self) -> dict[str, Any]:
        """All of it, with the sums that are worked out."""
        sums = {
            name: {"max": d.max, "mean": d.mean, "kl": d.kl, "agreement": d.agreement, "diverged": d.diverged}
            for name, d in (("floor", self.floor), ("patched", self.patched))
        }
        found = asdict(self)
        for name, numbers in sums.items():
            found[name] = {**numbers, "prompts": found[name]["prompts"]}
        return {**found, "passed": self.passed}


def judged(stock: Outcome, again: Outcome, patched: Outcome) -> Verdict:
    """The verdict of one model from its three runs."""
    floor, difference = compare(stock.answers, again.answers), compare(stock.answers, patched.answers)
    ours = [row for row in patched.rows if row["op"] and not row["reason"] and row["calls"]]
    kept: dict[str, list[str]] = {}
    for row in patched.rows:
        if row["reason"] and row["calls"]:
            kept.setdefault(row["reason"], []).append(name(row))
    layers = {name(row) for row in patched.rows if row["layer"]}
    taken = {name(row) for row in ours}
    silent = [name(row) for row in patched.rows if not row["op"]]
    how = [entry for row in ours for entry in row["implementations"]]
    return Verdict(
        model=stock.model,
        floor=floor,
        patched=difference,
        verdict=judge(floor, difference) if ours else INERT,
        taken=sorted(taken),
        others=sorted(layers - taken),
        backends=[backend for backend, _ in Counter(entry["backend"] for entry in how).most_common()],
        numerics=[numerics for numerics, _ in Counter(entry["numerics"] for entry in how).most_common()],
        kept=kept,
        silent=silent,
        missing=patched.missing,
    )


def name(row: dict[str, Any]) -> str:
    """A layer, or what is known of one that has no name."""
    return str(row["layer"] or f"({row['op']} of {row['width']} columns, no layer's weight)")


def left_to_inductor(verdict: Verdict, about: dict[str, Any]) -> str:
    """Why layers of a compiled model were not called through a hook, "" where it is not that."""
    scope = about["flags"].get("NORM_PLUGIN_SCOPE", "eager")
    if not verdict.silent or about["mode"] != "compiled" or scope != "eager":
        return ""
    return (
        "what the engine compiles is left to Inductor; NORM_PLUGIN_SCOPE=all puts ours there, --eager runs all of them"
    )


def summary(verdicts: list[Verdict]) -> str:
    """One line for all models."""
    words = Counter(verdict.verdict for verdict in verdicts)
    ordered = [word for word in (IDENTICAL, INSIDE, OUTSIDE, INERT) if words[word]]
    return f"{len(verdicts)} model{'s' * (len(verdicts) > 1)}: " + ", ".join(f"{words[w]} {w}" for w in ordered)
