"""Direction methods compared without a search."""
