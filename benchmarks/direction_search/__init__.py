"""Direction methods at the same search budget."""
