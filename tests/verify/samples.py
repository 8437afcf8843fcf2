"""Answers, outcomes and verdicts that a test can say in a line."""

from __future__ import annotations

from typing import Any

from norm_plugin.verify.outcome import Answer, Outcome


def answer(tokens: list[int], shift: float = 0.0, prompt: list[int] | None = None) -> Answer:
    """At each position the token and its four successors, each half as likely as the one before, all shifted."""
    top = [{str(token + i): -0.8 - 0.7 * i + shift * (i % 2) for i in range(5)} for token in tokens]
    return Answer(prompt or [1, 2, 3], tokens, [position[str(t)] for t, position in zip(tokens, top, strict=True)], top)


def row(layer: str, reason: str = "", calls: int = 16, op: str = "rmsnorm") -> dict[str, Any]:
    """A row of a report."""
    how = [] if reason else [{"backend": "native", "because": "asked for", "numerics": "hf", "configuration": ""}]
    return {
        "layer": layer, "class": "RMSNorm", "op": op, "reason": reason, "width": 128, "dtype": "bfloat16",
        "strides": [[128, 1]], "implementations": how if op else [], "calls": calls, "replayed": 0,
    }  # fmt: skip


def outcome(answers: list[Answer], rows: list[dict[str, Any]] | None = None) -> Outcome:
    """One model's."""
    return Outcome(
        "vllm", "0.32.0", "llama", "bfloat16", "cpu", "eager", {"NORM_PLUGIN": "native"}, answers, rows or []
    )
