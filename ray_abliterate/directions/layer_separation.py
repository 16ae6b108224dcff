"""How well directions separate two sets of residuals, layer by layer."""

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
    """One set projected onto directions.

    Attributes:
        sums: The sums of all prompts' residuals.
        along: Each prompt's coordinate along the direction of each layer.
    """

    sums: Sums
    along: Float[numpy.ndarray, "prompt layer"]


def measure_layer_separation(
    behaviour: ProjectedSet, neutral: ProjectedSet, directions: Directions
) -> list[Any]:
    """Measure how well each layer's direction separates the two sets: one dictionary per layer.

    Of coordinates along directions that were found without the prompts: `auroc`: chance that a
    behaviour prompt projects above a neutral one (0.5: no separation); `fisher`: squared distance
    of the projected means over the sum of variances; `silhouette` and `mutual_information` of the
    projections (`ray_abliterate.directions.separability`).

    Of all prompts' means: `gap`: their distance along the direction, above 0 if the behaviour's
    lies further along; `cosine` of the two; `behaviour_norm`, `neutral_norm`, `direction_norm`:
    lengths of both and of their difference, in units of the residual stream.

    Args:
        behaviour: Sums, and coordinates along the directions of other folds.
        neutral: The same of the neutral set.
        directions: The directions of all prompts.
    """
    # (layer, hidden), float64
    a_mean, b_mean = torch.from_numpy(behaviour.sums.mean), torch.from_numpy(neutral.sums.mean)
    rows = []
    for layer in range(a_mean.shape[0]):
        a, b = behaviour.along[:, layer], neutral.along[:, layer]
        norms = float(a_mean[layer].norm()), float(b_mean[layer].norm())
        cosine = float(a_mean[layer] @ b_mean[layer]) / max(norms[0] * norms[1], 1e-300)
        difference = a_mean[layer] - b_mean[layer]
        rows.append(
            {
                "layer": layer,
                "auroc": auroc(a, b),
                "fisher": fisher(a, b),
                "silhouette": silhouette(a, b),
                "mutual_information": mutual_information(a, b),
                "gap": float(difference @ directions.vectors[layer].double()),
                "cosine": cosine,
                "behaviour_norm": norms[0],
                "neutral_norm": norms[1],
                "direction_norm": float(difference.norm()),
            }
        )
    return rows


def best_layer(rows: list[Any], by: str = "fisher") -> int:
    """Return the layer whose direction separates best, of those that `tried_layers` allows.

    Args:
        rows: One row for each layer.
        by: The measure. Where it is equal, the Fisher ratio decides; where that is equal too (no
            prompt could be held out), the distance of the means relative to their lengths.
    """
    candidates = [rows[layer] for layer in tried_layers([True] * len(rows))]
    best = max(candidates, key=lambda row: (row[by], row["fisher"], _relative_distance(row)))
    return int(best["layer"])


def _relative_distance(row: Mapping[str, Any]) -> float:
    lengths = row.get("behaviour_norm", 0.0) + row.get("neutral_norm", 0.0)
    return row.get("direction_norm", 0.0) / lengths if lengths else 0.0


def best_position(rows: Mapping[int, list[Any]]) -> int:
    """Return the token position that has the layer that separates best; of equals the first.

    Args:
        rows: By position, the rows of `measure_layer_separation`.
    """

    def separation_at(position: int) -> tuple[float, int]:
        return rows[position][best_layer(rows[position])]["fisher"], -position

    return max(rows, key=separation_at)
