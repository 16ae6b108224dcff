"""How well directions tell two sets of residuals apart, layer by layer."""

import math
from typing import Any

import torch

from ray_abliterate.separation import auroc, fisher
from ray_abliterate.shards import Projected


def separation(behaviour: Projected, neutral: Projected) -> list[Any]:
    """How well each layer's direction tells the two sets apart: one dictionary per layer.

    `auroc`: chance that a behaviour prompt projects above a neutral one (0.5: not at all);
    `fisher`: squared distance of the projected means over the sum of variances; `cosine` of the
    two means; `behaviour_norm`, `neutral_norm`, `direction_norm`: lengths of the means and of
    their difference, in units of the residual stream.
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
                "cosine": cosine,
                "behaviour_norm": norms[0],
                "neutral_norm": norms[1],
                "direction_norm": float((a_mean[layer] - b_mean[layer]).norm()),
            }
        )
    return rows


def best_layer(rows: list[Any]) -> int:
    """The layer whose direction separates best (Fisher ratio), the last fifth left aside.

    The last layers separate well but prepare the next token rather than carry the behaviour
    (Arditi et al. 2024 drop the last 20 %).
    """
    candidates = rows[: max(1, math.ceil(0.8 * len(rows)))]
    return int(max(candidates, key=lambda row: row["fisher"])["layer"])


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
