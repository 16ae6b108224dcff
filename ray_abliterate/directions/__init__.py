"""Directions of a behaviour in the residual stream. Pure mathematics."""
