"""Tiny models with random weights, made on the spot: what verify and the tests run the engines on."""
