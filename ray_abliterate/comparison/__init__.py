"""Direction methods compared without a search: on held-out prompts, and on samples of the prompts.

Pure mathematics on residuals; knows nothing about models, files or figures.
"""

from ray_abliterate.comparison.advice import Advice
from ray_abliterate.comparison.compare import Comparison, Layered, best_row, compare
from ray_abliterate.comparison.cross_fitting import along_others
from ray_abliterate.comparison.fits import Sets
from ray_abliterate.comparison.held_out import HeldOut, halves, held_out

__all__ = [
    "Advice",
    "Comparison",
    "HeldOut",
    "Layered",
    "Sets",
    "along_others",
    "best_row",
    "compare",
    "halves",
    "held_out",
]
