"""Exports: the model that a plan makes, written from the original's files one tensor at a time."""
