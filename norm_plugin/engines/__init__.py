"""What knows an engine: one file each, and the record and the ledger that they share."""

#: The engines that have an adapter here, by the name of its module.
ENGINES = ("vllm", "sglang")
