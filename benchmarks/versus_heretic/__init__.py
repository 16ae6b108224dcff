"""Trials and studies compared with those of Heretic 1.4."""
