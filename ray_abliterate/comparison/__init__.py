"""Direction methods compared without a search: on held-out prompts, and on samples of the prompts.

Pure mathematics on residuals; knows nothing about models, files or figures.
"""

from ray_abliterate.comparison.advice import Advice
from ray_abliterate.comparison.compare import Comparison, Layered, best_row, compare
from ray_abliterate.comparison.fits import Sets
from ray_abliterate.comparison.held_out import HeldOut, centred, halves, held_out, vectors_without

__all__ = [
    "Advice",
    "Comparison",
    "HeldOut",
    "Layered",
    "Sets",
    "best_row",
    "centred",
    "compare",
    "halves",
    "held_out",
    "vectors_without",
]
