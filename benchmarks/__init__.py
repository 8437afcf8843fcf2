"""Measurements, and the tables made from them. Each file is a command: `python -m benchmarks.NAME --help`."""
