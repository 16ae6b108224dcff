"""The direction methods of this package, by the name that a recipe gives them.

Each is one function of the two sets, with its paper in its docstring, and declares what it needs of
them. Add one here, or outside the package: see `docs/extending.md`.
"""

from collections.abc import Callable
from typing import Any

from ray_abliterate.directions.methods.discriminants import (
    inlp,
    leace,
    logistic_probe,
    whitened,
)
from ray_abliterate.directions.methods.mean_differences import (
    geometric_median,
    mean_difference,
    median_difference,
    median_of_means,
    variance_scaled,
)
from ray_abliterate.directions.methods.principal_components import (
    contrastive_pca,
    pca_centred,
    pca_paired,
    svd_subspace,
)

__all__ = [
    "METHODS",
]

METHODS: dict[str, Callable[..., Any]] = {
    "mean-difference": mean_difference,
    "median-difference": median_difference,
    "geometric-median": geometric_median,
    "median-of-means": median_of_means,
    "variance-scaled": variance_scaled,
    "whitened": whitened,
    "pca-paired": pca_paired,
    "pca-centred": pca_centred,
    "contrastive-pca": contrastive_pca,
    "svd-subspace": svd_subspace,
    "logistic-probe": logistic_probe,
    "inlp": inlp,
    "leace": leace,
}
"""By the name that a recipe gives."""
