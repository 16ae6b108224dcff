"""How well directions tell two sets of residuals apart, layer by layer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from jaxtyping import Float

from ray_abliterate.directions.directions import Directions
from ray_abliterate.directions.layer_selection import tried_layers
from ray_abliterate.directions.residuals.shard import Sums
from ray_abliterate.directions.separability import auroc, fisher, mutual_information, silhouette


@dataclass(frozen=True)
class ProjectedSet:
    """A set along directions: the sums of all prompts, and coordinates after every layer."""

    sums: Sums
    along: Float[numpy.ndarray, "prompt layer"]


def measure_layer_separation(
    behaviour: ProjectedSet, neutral: ProjectedSet, directions: Directions
) -> list[Any]:
    """How well each layer's direction tells the two sets apart: one dictionary per layer.

    Of coordinates along directions that the prompts had no part in: `auroc`: chance that a
    behaviour prompt projects above a neutral one (0.5: not at all); `fisher`: squared distance of
    the projected means over the sum of variances; `silhouette` and `mutual_information` of the
    projections (`ray_abliterate.directions.separability`).

    Of all prompts' means: `gap`: their distance along the direction, above 0 if the behaviour's
    lies further along; `cosine` of the two; `behaviour_norm`, `neutral_norm`, `direction_norm`:
    lengths of both and of their difference, in units of the residual stream.

    Args:
        behaviour: Sums, and coordinates along the directions of other folds.
        neutral: The same.
        directions: Those of all prompts.
    """
    a_mean, b_mean = torch.from_numpy(behaviour.sums.mean), torch.from_numpy(neutral.sums.mean)
    rows = []
    for layer in range(a_mean.shape[0]):
        a, b = behaviour.along[:, layer], neutral.along[:, layer]
        norms = float(a_mean[layer].norm()), float(b_mean[layer].norm())
        cosine = float(a_mean[layer] @ b_mean[layer]) / max(norms[0] * norms[1], 1e-300)
        apart = a_mean[layer] - b_mean[layer]
        rows.append(
            {
                "layer": layer,
                "auroc": auroc(a, b),
                "fisher": fisher(a, b),
                "silhouette": silhouette(a, b),
                "mutual_information": mutual_information(a, b),
                "gap": float(apart @ directions.vectors[layer].double()),
                "cosine": cosine,
                "behaviour_norm": norms[0],
                "neutral_norm": norms[1],
                "direction_norm": float(apart.norm()),
            }
        )
    return rows


def best_layer(rows: list[Any], by: str = "fisher") -> int:
    """The layer whose direction separates best, the last fifth left aside; see `tried_layers`.

    Args:
        rows: A row a layer.
        by: The measure; where it is the same, the Fisher ratio decides; where that is the same
            (no prompt could be held out), how far the means lie apart, in their own lengths.
    """
    candidates = [rows[layer] for layer in tried_layers([True] * len(rows))]
    found = max(candidates, key=lambda row: (row[by], row["fisher"], _apart(row)))
    return int(found["layer"])


def _apart(row: Mapping[str, Any]) -> float:
    lengths = row.get("behaviour_norm", 0.0) + row.get("neutral_norm", 0.0)
    return row.get("direction_norm", 0.0) / lengths if lengths else 0.0


def best_position(rows: Mapping[int, list[Any]]) -> int:
    """Which of several token positions has the layer that separates best; of equals the first.

    Args:
        rows: `measure_layer_separation` of each.
    """
    return max(rows, key=lambda place: (rows[place][best_layer(rows[place])]["fisher"], -place))
