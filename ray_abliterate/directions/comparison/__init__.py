"""Comparison of direction methods on held-out prompts, without a search."""
