"""What a worker process of vLLM can be asked about norm_plugin: its own file, because vLLM imports it by name."""

from __future__ import annotations

from typing import Any

from norm_plugin.engines import call_counts
from norm_plugin.engines.installed_hooks import installed


class Worker:
    """What vLLM's workers get as further methods: what was hooked there, and who normalized."""

    def norm_plugin_forget(self) -> None:
        """Begin to count at 0: what vLLM runs to find out how much memory it has does not matter."""
        for row in call_counts.rows():
            row.calls = 0

    def norm_plugin_report(self) -> dict[str, Any]:
        """In words and numbers that can travel between processes."""
        hooks = installed.get("vllm")
        found = {"hooks": {}, "missing": {}} if hooks is None else {"hooks": hooks.live, "missing": hooks.missing}
        return {**found, "rows": call_counts.facts()}
