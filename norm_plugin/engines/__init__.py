"""What knows an engine: one file each, and what they share: the hooks with their undo, and the counts of calls."""

#: The engines that have an adapter here, by the name of its module.
ENGINES = ("vllm", "sglang")
