"""Directions of a behaviour in the residual stream: the value, how it is found, how well it does.

Pure mathematics on residuals; knows nothing about models. The methods are in `methods`.
"""

from ray_abliterate.directions.finding import (
    compute,
    from_layers,
    from_moments,
    from_sums,
    need_of,
    refuse_unknown,
    rows_per_layer,
)
from ray_abliterate.directions.selection import LayerScores, Selection, tried_layers
from ray_abliterate.directions.separation import (
    Projected,
    best_layer,
    best_position,
    separation,
)
from ray_abliterate.directions.value import Blend, Directions, NoDirection

__all__ = [
    "Blend",
    "Directions",
    "LayerScores",
    "NoDirection",
    "Projected",
    "Selection",
    "best_layer",
    "best_position",
    "compute",
    "from_layers",
    "from_moments",
    "from_sums",
    "need_of",
    "refuse_unknown",
    "rows_per_layer",
    "separation",
    "tried_layers",
]
