"""Lets a worker process of vLLM be asked about norm_plugin: its own file, because vLLM imports it by name."""

from __future__ import annotations

from typing import Any

from norm_plugin.engines import call_counts
from norm_plugin.engines.installed_hooks import installed


class Worker:
    """Methods for vLLM's workers: what was hooked there, and who normalized."""

    def norm_plugin_forget(self) -> None:
        """Count from 0 again: the calls by which vLLM measures its memory do not matter."""
        for row in call_counts.rows():
            row.calls = 0

    def norm_plugin_report(self) -> dict[str, Any]:
        """In words and numbers that can travel between processes."""
        hooks = installed.get("vllm")
        found = {"hooks": {}, "missing": {}} if hooks is None else {"hooks": hooks.live, "missing": hooks.missing}
        return {**found, "rows": call_counts.facts()}
