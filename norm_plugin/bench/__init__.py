"""Measuring the ops on a GPU, beside whatever else is installed there."""
