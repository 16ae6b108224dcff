"""Directions: unit vectors in the residual stream that a behaviour lies along, one per layer.

Pure mathematics on residuals; knows nothing about models. A method is a function from the means of
two sets to raw vectors, listed in `METHODS`, or from the two sets' residuals, named as
`module:function` in the recipe.
"""

import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from ray_abliterate.recipe import DirectionSettings
from ray_abliterate.residuals import LayerVectors, Residuals
from ray_abliterate.scoring import resolve
from ray_abliterate.shards import Projected, Sums

log = logging.getLogger(__name__)

VANISHING = 1e-6
"""A difference below this share of the residuals' own norm is rounding, not a direction."""


@runtime_checkable
class DirectionMethod(Protocol):
    """Computes one raw vector per layer, pointing from neutral to behaviour, in float64.

    The length of a vector does not matter; a layer with nothing to find gets zeros.
    """

    def __call__(self, behaviour: Residuals, neutral: Residuals, **options: Any) -> LayerVectors:
        """Raw vectors, `"layer hidden"`."""


@dataclass(frozen=True)
class Directions:
    """A unit vector per layer, float32 `"layer hidden"`; zeros where a layer has none.

    Attributes:
        vectors: The directions.
        method: Name of the method that found them.
        origin: Fingerprints of the two prompt sets, and what else they came from.
    """

    vectors: LayerVectors
    method: str
    origin: Mapping[str, str]

    def __post_init__(self) -> None:
        norms = self.vectors.double().norm(dim=-1)
        wrong = ((norms - 1).abs() > 1e-5) & (norms != 0)
        if wrong.any():
            layer = int(wrong.nonzero()[0])
            raise ValueError(f"the direction of layer {layer} has length {norms[layer]:.6f}, not 1")
        if not (norms > 0).any():
            raise ValueError(
                "no layer has a direction: the two prompt sets leave the same residuals.\n"
                "  Check that prompts.behaviour and prompts.neutral are different prompts."
            )

    @property
    def layers(self) -> int:
        """Number of layers."""
        return self.vectors.shape[0]

    @property
    def usable(self) -> tuple[bool, ...]:
        """Whether each layer has a direction."""
        return tuple(bool(row.any()) for row in self.vectors)

    def blend(self, layer: float) -> tuple[tuple[int, float], ...]:
        """Rows and weights whose sum is the direction at a (fractional) layer.

        One row, or the two neighbours: `(1 - f) v_low ± f v_high`, the sign chosen so that they
        don't cancel, scaled to unit length. A neighbour without a direction is left out; if both
        are, the nearest layer that has one stands in.
        """
        if not 0 <= layer <= self.layers - 1:
            raise ValueError(f"layer {layer} is outside 0 to {self.layers - 1}")
        low, share = math.floor(layer), layer - math.floor(layer)
        parts = [(low, 1 - share), (low + 1, share)] if share else [(low, 1.0)]
        usable = self.usable
        parts = [(row, weight) for row, weight in parts if usable[row]]
        if not parts:
            rows = [row for row, has in enumerate(usable) if has]
            return ((min(rows, key=lambda row: abs(row - layer)), 1.0),)
        if len(parts) == 1:
            return ((parts[0][0], 1.0),)
        (a, weight_a), (b, weight_b) = parts
        cosine = float(self.vectors[a].double() @ self.vectors[b].double())
        if cosine < 0:
            cosine, weight_b = -cosine, -weight_b
        norm = math.sqrt(weight_a**2 + weight_b**2 + 2 * weight_a * abs(weight_b) * cosine)
        return (a, weight_a / norm), (b, weight_b / norm)

    def at(self, layer: float) -> Float[Tensor, " hidden"]:
        """The unit direction at a layer that may lie between two."""
        parts = [weight * self.vectors[row].double() for row, weight in self.blend(layer)]
        total = torch.stack(parts).sum(dim=0)
        return torch.nn.functional.normalize(total, dim=0).float()

    def to_bytes(self) -> bytes:
        """A safetensors file."""
        from safetensors.torch import save

        facts = {"method": self.method, "origin": json.dumps(dict(self.origin), sort_keys=True)}
        return save({"directions": self.vectors.contiguous()}, metadata=facts)

    @classmethod
    def from_bytes(cls, data: bytes) -> "Directions":
        """The inverse of `to_bytes`, bit for bit."""
        from safetensors.torch import load

        length = int.from_bytes(data[:8], "little")
        facts = json.loads(data[8 : 8 + length])["__metadata__"]
        return cls(load(data)["directions"], facts["method"], json.loads(facts["origin"]))


def mean_difference(behaviour: LayerVectors, neutral: LayerVectors) -> LayerVectors:
    """Mean of the behaviour's residuals minus mean of the neutral ones (Arditi et al. 2024)."""
    return behaviour - neutral


METHODS: dict[str, Callable[..., LayerVectors]] = {"mean-difference": mean_difference}
"""Methods that need the two means only, which are reduced where the residuals are."""


def compute(behaviour: Residuals, neutral: Residuals, settings: DirectionSettings) -> Directions:
    """The directions that the recipe asks for.

    Residuals are winsorised if asked, the method gives raw vectors, the mean of the neutral
    residuals is projected out if asked (so that the ablation leaves it alone), and the rest is
    scaled to unit length; all in float64, rounded once.

    Raises:
        ValueError: the shapes differ, or no layer has a direction.
    """
    if behaviour.values.shape[1:] != neutral.values.shape[1:]:
        raise ValueError(
            f"residuals of different models: {tuple(behaviour.values.shape)} and "
            f"{tuple(neutral.values.shape)} (prompt, layer, hidden)"
        )
    behaviour = behaviour.winsorized(settings.winsorize_quantile)
    neutral = neutral.winsorized(settings.winsorize_quantile)
    origin = {"behaviour": behaviour.fingerprint, "neutral": neutral.fingerprint}
    means = behaviour.mean(), neutral.mean()
    if settings.method in METHODS:
        raw = METHODS[settings.method](*means, **settings.options)
    else:
        raw = resolve(settings.method)(behaviour, neutral, **settings.options)
    return _unit(raw.double(), *means, settings, origin)


def from_sums(
    behaviour: Sums, neutral: Sums, settings: DirectionSettings, origin: Mapping[str, str]
) -> Directions:
    """What `compute` finds, for a method in `METHODS`, from sums of winsorised residuals.

    The means differ from those of whole sets by float64 rounding, the directions by at most one
    rounding to float32.

    Raises:
        ValueError: the shapes differ, or no layer has a direction.
    """
    means = torch.from_numpy(behaviour.mean), torch.from_numpy(neutral.mean)
    return _unit(METHODS[settings.method](*means, **settings.options), *means, settings, origin)


def _unit(
    raw: LayerVectors,
    behaviour: LayerVectors,
    neutral: LayerVectors,
    settings: DirectionSettings,
    origin: Mapping[str, str],
) -> Directions:
    """Raw vectors, and the means of the two sets, made directions."""
    if settings.project_out_neutral:
        raw = _without_neutral_mean(raw, neutral)
    scale = torch.maximum(behaviour.norm(dim=-1), neutral.norm(dim=-1))
    norms = raw.norm(dim=-1)
    usable = norms > VANISHING * scale.clamp_min(torch.finfo(torch.float32).tiny)
    for layer in (~usable).nonzero().flatten().tolist():
        log.warning("layer %d has no direction: the two sets don't differ there", layer)
    unit = torch.where(usable[:, None], raw / norms.clamp_min(1e-300)[:, None], 0.0)
    return Directions(unit.float(), settings.method, origin)


def _without_neutral_mean(raw: LayerVectors, neutral_mean: LayerVectors) -> LayerVectors:
    """`raw` made orthogonal to the neutral mean; a layer where nothing else is left keeps it."""
    unit = neutral_mean / neutral_mean.norm(dim=-1, keepdim=True).clamp_min(1e-300)
    rest = raw
    for _ in range(2):  # twice: the second pass takes out the first one's rounding
        rest = rest - (rest * unit).sum(dim=-1, keepdim=True) * unit
    vanished = rest.norm(dim=-1) <= VANISHING * raw.norm(dim=-1)
    for layer in (vanished & (raw.norm(dim=-1) > 0)).nonzero().flatten().tolist():
        log.warning(
            "layer %d: the direction is parallel to the neutral mean; it is kept whole", layer
        )
    return torch.where(vanished[:, None], raw, rest)


def separation(behaviour: Projected, neutral: Projected) -> list[Any]:
    """How well each layer's direction tells the two sets apart: one dictionary per layer.

    `auroc`: chance that a behaviour prompt projects above a neutral one (0.5: not at all);
    `fisher`: squared distance of the projected means over the sum of variances; `cosine` of the
    two means; `behaviour_norm`, `neutral_norm`, `direction_norm`: lengths of the means and of
    their difference, in units of the residual stream.
    """
    a_mean, b_mean = torch.from_numpy(behaviour.sums.mean), torch.from_numpy(neutral.sums.mean)
    a_along, b_along = torch.from_numpy(behaviour.along), torch.from_numpy(neutral.along)
    rows = []
    for layer in range(a_mean.shape[0]):
        a, b = a_along[:, layer], b_along[:, layer]
        spread = float(a.var(unbiased=False) + b.var(unbiased=False))
        gap = float(a.mean() - b.mean())
        norms = float(a_mean[layer].norm()), float(b_mean[layer].norm())
        cosine = float(a_mean[layer] @ b_mean[layer]) / max(norms[0] * norms[1], 1e-300)
        rows.append(
            {
                "layer": layer,
                "auroc": _auroc(a, b),
                "fisher": gap * gap / spread if spread > 0 else 0.0,
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


def _auroc(a: Float[Tensor, " n"], b: Float[Tensor, " m"]) -> float:
    wins = (a[:, None] > b[None]).double().mean() + 0.5 * (a[:, None] == b[None]).double().mean()
    return float(wins)
