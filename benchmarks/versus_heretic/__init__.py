"""Trials and studies beside those of Heretic 1.4."""
