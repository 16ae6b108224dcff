"""How well directions tell two sets of residuals apart, layer by layer."""

from typing import Any

import torch

from ray_abliterate.directions.selection import tried_layers
from ray_abliterate.separation import auroc, fisher, mutual_information, silhouette
from ray_abliterate.shards import Projected


def separation(behaviour: Projected, neutral: Projected) -> list[Any]:
    """How well each layer's direction tells the two sets apart: one dictionary per layer.

    `auroc`: chance that a behaviour prompt projects above a neutral one (0.5: not at all);
    `fisher`: squared distance of the projected means over the sum of variances; `silhouette` and
    `mutual_information` of the projections (`ray_abliterate.separation`); `gap`: distance of the
    projected means, above 0 if the behaviour's lies further along; `cosine` of the two means;
    `behaviour_norm`, `neutral_norm`, `direction_norm`: lengths of the means and of their
    difference, in units of the residual stream.
    """
    a_mean, b_mean = torch.from_numpy(behaviour.sums.mean), torch.from_numpy(neutral.sums.mean)
    rows = []
    for layer in range(a_mean.shape[0]):
        a, b = behaviour.along[:, layer], neutral.along[:, layer]
        norms = float(a_mean[layer].norm()), float(b_mean[layer].norm())
        cosine = float(a_mean[layer] @ b_mean[layer]) / max(norms[0] * norms[1], 1e-300)
        rows.append(
            {
                "layer": layer,
                "auroc": auroc(a, b),
                "fisher": fisher(a, b),
                "silhouette": silhouette(a, b),
                "mutual_information": mutual_information(a, b),
                "gap": float(a.mean() - b.mean()),
                "cosine": cosine,
                "behaviour_norm": norms[0],
                "neutral_norm": norms[1],
                "direction_norm": float((a_mean[layer] - b_mean[layer]).norm()),
            }
        )
    return rows


def best_layer(rows: list[Any], by: str = "fisher") -> int:
    """The layer whose direction separates best, the last fifth left aside; see `tried_layers`.

    Args:
        rows: A row a layer.
        by: The measure; where it is the same, the Fisher ratio decides.
    """
    candidates = [rows[layer] for layer in tried_layers([True] * len(rows))]
    return int(max(candidates, key=lambda row: (row[by], row["fisher"]))["layer"])


def best_position(rows: list[Any], layers: int) -> int:
    """Which of several token positions has the layer that separates best, counted from the end.

    Of equals the last token.

    Args:
        rows: `separation` of all layers at the last token, then at the one before it, and so on.
        layers: How many belong to a position.
    """
    positions = [rows[first : first + layers] for first in range(0, len(rows), layers)]
    best = [own[best_layer([{**r, "layer": i} for i, r in enumerate(own)])] for own in positions]
    return max(range(len(best)), key=lambda place: (best[place]["fisher"], -place))
