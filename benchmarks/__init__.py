"""Benchmarks: one file or folder per claim; `python -m benchmarks` lists them."""
