"""From two sets of residuals after one block to directions."""
