"""A run: its directory, its stages in order, its results."""
