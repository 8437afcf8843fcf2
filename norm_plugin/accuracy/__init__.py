"""Judges outputs: fp64 oracles, the inputs to judge on, bounds, and distances in ulps."""
