"""Runs of the real SGLang for the tests."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from norm_plugin.verify.outcome import Outcome
from tests.engines import runs
from tests.engines.runs import NATIVE, ROOT, STOCK, TOKENS, environment, furthest, model

__all__ = ["NATIVE", "ROOT", "STOCK", "TOKENS", "environment", "furthest", "model"]

python = partial(runs.python, "sglang")


def side_by_side(models: list[Path], flags: Mapping[str, str], *options: str) -> dict[str, tuple[Outcome, Outcome]]:
    """Stock and patched of each model, run at the same time."""
    return runs.side_by_side("sglang", models, flags, *options)


def in_schedulers(outcome: Outcome) -> dict[tuple[str, str], int]:
    """Calls by op and reason, of the processes that ran the model."""
    return runs.calls(outcome, "scheduler")
