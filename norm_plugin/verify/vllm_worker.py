"""What a worker process of vLLM can be asked about norm_plugin: its own file, because vLLM imports it by name."""

from __future__ import annotations

from typing import Any

from norm_plugin.engines import call_counts, vllm


class Worker:
    """What vLLM's workers get as further methods: what was hooked there, and who normalized."""

    def norm_plugin_forget(self) -> None:
        """Begin to count at 0: what vLLM runs to find out how much memory it has does not matter."""
        for row in call_counts.rows():
            row.calls = 0

    def norm_plugin_report(self) -> dict[str, Any]:
        """In words and numbers that can travel between processes."""
        record = vllm.record()
        hooks = {"hooks": {}, "missing": {}} if record is None else {"hooks": record.live, "missing": record.missing}
        return hooks | {"rows": call_counts.facts()}
