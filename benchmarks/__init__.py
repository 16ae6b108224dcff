"""Benchmarks: one file or folder a claim; figures are kept in `results/`."""
