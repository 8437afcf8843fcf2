"""What verify says of one model: how patched differs from stock, how stock differs from itself, and who normalized."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from norm_plugin.verify import rounding
from norm_plugin.verify.comparison import IDENTICAL, INSIDE, OUTSIDE, Difference, compare, judge
from norm_plugin.verify.outcome import Outcome

#: Verdicts if nothing of ours ran, so that there was nothing to test.
INERT = "nothing was patched"
LEFT = "left to the compiler"

#: The op of an all-reduce that the engine did; the names of ours that do it with a norm begin like this.
ALLREDUCE = "allreduce"


@dataclass
class Verdict:
    """One model."""

    model: str
    floor: Difference
    patched: Difference
    verdict: str
    taken: list[str]
    fused: list[str]
    others: list[str]
    backends: list[str]
    numerics: list[str]
    kept: dict[str, list[str]]
    silent: list[str]
    missing: dict[str, str]
    step: float
    instead: dict[str, str]

    @property
    def passed(self) -> bool:
        """Whether this model may be served patched."""
        return self.verdict in (IDENTICAL, INSIDE) and not self.instead

    @property
    def differs(self) -> bool:
        """Whether patched gives other answers. If neither this nor `passed` holds, it could not be tested as asked."""
        return self.verdict == OUTSIDE

    def as_json(self) -> dict[str, Any]:
        """All of it, with the sums that are worked out."""
        found = asdict(self)
        for name, d in (("floor", self.floor), ("patched", self.patched)):
            sums = {sum: getattr(d, sum) for sum in ("max", "mean", "kl", "agreement", "diverged")}
            found[name] = sums | found[name]
        return {**found, "passed": self.passed}


def judged(stock: Outcome, again: Outcome, patched: Outcome) -> Verdict:
    """The verdict of one model from its three runs."""
    floor, difference = compare(stock.answers, again.answers), compare(stock.answers, patched.answers)
    ours = [row for row in patched.rows if row["op"] and not row["reason"] and row["calls"]]
    kept: dict[str, list[str]] = {}
    for row in patched.rows:
        if row["reason"] and row["calls"]:
            kept.setdefault(row["reason"], []).append(name(row))
    layers = {name(row) for row in patched.rows if row["layer"] and row["op"] != ALLREDUCE}  # that is no norm
    taken = {name(row) for row in ours}
    silent = [name(row) for row in patched.rows if not row["op"]]
    how = [entry for row in ours for entry in row["implementations"]]
    sums = (max((row["width"] for row in ours), default=1), len(taken))
    step = 0.0 if same_sums(patched, ours) else rounding.step(stock.answers, patched.dtype, *sums)
    word = judge(floor, difference, step)
    if not ours and word != OUTSIDE:
        word = LEFT if left_out(patched.mode, patched.flags) else INERT
    asked = patched.flags.get("NORM_PLUGIN")
    return Verdict(
        model=stock.model,
        floor=floor,
        patched=difference,
        verdict=word,
        taken=sorted(taken),
        fused=sorted({name(row) for row in across_ranks(ours)}),
        others=sorted(layers - taken),
        backends=[backend for backend, _ in Counter(entry["backend"] for entry in how).most_common()],
        numerics=[numerics for numerics, _ in Counter(entry["numerics"] for entry in how).most_common()],
        kept=kept,
        silent=silent,
        missing=patched.missing,
        step=step,
        instead={entry["backend"]: entry["because"] for entry in how if asked == "triton" != entry["backend"]},
    )


def name(row: dict[str, Any]) -> str:
    """A layer, or what is known of one that has no name."""
    return str(row["layer"] or f"({row['op']} of {row['width']} columns, no layer's weight)")


def across_ranks(ours: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of ops that did an all-reduce too."""
    return [row for row in ours if row["op"].startswith(ALLREDUCE)]


def same_sums(patched: Outcome, ours: list[dict[str, Any]]) -> bool:
    """Whether ours sums in the order of stock: nothing of ours ran, or our PyTorch on a CPU, not compiled, and no
    all-reduce, whose order and rounding are an engine's own."""
    ran = {entry["backend"] for row in ours for entry in row["implementations"]}
    in_pytorch = patched.device == "cpu" and patched.mode == "eager" and ran == {"native"}
    return not ran or (in_pytorch and not across_ranks(ours))


def left_out(mode: str, flags: dict[str, str]) -> bool:
    """Whether the layers of a model stay the engine's because it compiles them."""
    return mode == "compiled" and flags.get("NORM_PLUGIN_SCOPE", "eager") == "eager"


def heading(verdicts: list[Verdict], about: dict[str, Any]) -> str:
    """What was compared: the backends that ran, and the one that was asked for where that is another."""
    ran = list(dict.fromkeys(backend for verdict in verdicts for backend in verdict.backends))
    asked = about["backend"]
    against = " and ".join(ran) or "nothing of ours"
    if not ran or (asked != "auto" and ran != [asked]):
        against += f" ({asked} was asked for)"
    ranks = f"{about['tp']} ranks, " if about["tp"] > 1 else ""
    return (
        f"{about['engine']} {about['version']}, {ranks}{about['mode']}, {about['dtype']} on {about['device']}: "
        f"stock against {against}"
    )


def remarks(verdict: Verdict, about: dict[str, Any]) -> Iterator[str]:
    """What stayed the engine's, and why."""
    for backend, because in verdict.instead.items():
        yield f"triton was asked for, and {backend} ran instead: {because}"
    if verdict.fused:
        yield f"all-reduce and norm are one op in {several(verdict.fused)}"
    for hook, reason in verdict.missing.items():
        yield f"the hook {hook} is missing: {reason}"
    for reason, layers in verdict.kept.items():
        yield f"kept by the engine in {several(layers)}: {reason}"
    compiled = left_out(about["mode"], about["flags"])
    if verdict.silent and compiled:
        yield f"compiled by {about['engine']}, which is as fast: {several(verdict.silent)}"
    elif verdict.silent:
        yield f"never called through a hook: {several(verdict.silent)}"
    if verdict.verdict == LEFT:
        yield (
            "so in this mode nothing of norm_plugin runs, the answers are the engine's own, and there was nothing to "
            "test. NORM_PLUGIN_SCOPE=all puts ours into compiled code, --enforce-eager runs all of them"
        )
    elif verdict.verdict == INERT:
        yield "no call reached an op of ours, so there was nothing to test: `norm-plugin doctor` looks for the reason"


def several(layers: list[str]) -> str:
    shown = ", ".join(layers[:3])
    return shown if len(layers) <= 3 else f"{shown} and {len(layers) - 3} more layers"


PROMPT_HEADINGS = (
    "prompt", "tokens in", "out", "first other token", "top-1", "max |Δ|", "mean |Δ|", "KL", "floor max |Δ|",
)  # fmt: skip


def prompt_rows(verdict: Verdict) -> Iterator[tuple[str, ...]]:
    """The table of one model, with a row for each prompt."""
    for i, (patched, floor) in enumerate(zip(verdict.patched.prompts, verdict.floor.prompts, strict=True), 1):
        where = "none" if patched.diverged_at is None else str(patched.diverged_at + 1)
        numbers = (number(x) for x in (patched.max, patched.mean, patched.kl, floor.max))
        yield str(i), str(patched.prompt_tokens), str(patched.tokens), where, f"{patched.agreement:.0%}", *numbers


def number(x: float) -> str:
    """The number with two digits; 0 as "0"."""
    return "0" if x == 0 else f"{x:.1e}"


def summary(verdicts: list[Verdict]) -> str:
    """One line for all models."""
    words = Counter(verdict.verdict for verdict in verdicts)
    ordered = [word for word in (IDENTICAL, INSIDE, OUTSIDE, LEFT, INERT) if words[word]]
    return f"{len(verdicts)} model{'s' * (len(verdicts) > 1)}: " + ", ".join(f"{words[w]} {w}" for w in ordered)
