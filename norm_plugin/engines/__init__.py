"""What knows an engine: one file each, and the record and the ledger that they share."""
