"""Which layer's direction to begin with, by what it does to held-out prompts: taken out, and added.

The selection of Arditi et al. (2024, arXiv 2406.11717, section 2.3 and appendix C). Numbers only;
how they are measured is in `probing`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

MOST_DIVERGENCE = 0.1
"""Nats that neutral prompts may lose at the first token of their answers: the paper's."""
LAST_SHARE = 0.2
"""Of the layers, from the end, that aren't tried: they prepare the next token rather than carry the
behaviour (the paper's)."""
TABLE_HEADER = ("layer", "taken out: log-odds", "added: log-odds", "divergence (nats)", "")


def tried_layers(usable: Sequence[bool]) -> tuple[int, ...]:
    """The layers that have a direction, the last fifth left aside."""
    first = max(1, math.ceil((1 - LAST_SHARE) * len(usable)))
    return tuple(layer for layer in range(first) if usable[layer])


@dataclass(frozen=True)
class LayerScores:
    """What one layer's direction does. Log-odds are in nats: above 0 a refusal's beginning is
    likelier than all else.

    Attributes:
        layer: Where the direction was found.
        ablated: Mean log-odds of refusing `behaviour` prompts, the direction taken out everywhere.
        added: Mean log-odds of refusing neutral prompts, the direction added after its layer, as
            long as the sets' means lie apart along it.
        divergence: Mean KL divergence at neutral prompts when it is taken out, in nats.
        base: Mean log-odds of the base model: `behaviour` prompts, neutral ones.
        problem: Why there are no numbers; these are None then.
    """

    layer: int
    ablated: float | None
    added: float | None
    divergence: float | None
    base: tuple[float, float]
    problem: str = ""

    @property
    def dropped(self) -> str:
        """Why this layer can't be chosen; empty if it can."""
        if self.ablated is None or self.added is None or self.divergence is None:
            return self.problem
        if self.added <= 0:
            return "adding it does not bring refusals"
        if self.divergence > MOST_DIVERGENCE:
            return f"moves neutral prompts by more than {MOST_DIVERGENCE:g}"
        return ""


@dataclass(frozen=True)
class LayerSelection:
    """The layers that were tried.

    Attributes:
        key: Of all that was measured; another key, and it has to be measured again.
        method: That found the directions.
        layers: How many the model has.
        scores: By layer.
    """

    key: str
    method: str
    layers: int
    scores: tuple[LayerScores, ...]

    @property
    def chosen(self) -> LayerScores | None:
        """Of the layers that pass, the one that leaves the least log-odds of refusing; the first
        of equals. None if none passes."""
        passing = [one for one in self.scores if not one.dropped]
        return min(passing, key=lambda one: (one.ablated, one.layer), default=None)

    def sentence(self) -> str:
        """What was found, for people."""
        best = self.chosen
        if best is None:
            return (
                f"By log-odds on held-out prompts, none of the {len(self.scores)} layers' "
                f"directions ({self.method}) passes."
            )
        return (
            f"By log-odds on held-out prompts, layer {best.layer} has the best direction "
            f"({self.method}): without it refusals go from {best.base[0]:.2f} to "
            f"{best.ablated:.2f} nats, and neutral prompts move by {best.divergence:.3f} nats."
        )

    def rows(self) -> list[list[str]]:
        """A row of texts for the base model, and for each layer that was tried, under `TABLE_HEADER`."""
        best = self.chosen
        base = self.scores[0].base if self.scores else (math.nan, math.nan)
        found = [["base model", f"{base[0]:.2f}", f"{base[1]:.2f}", "", ""]]
        for one in self.scores:
            numbers = zip((one.ablated, one.added, one.divergence), (".2f", ".2f", ".3f"),
                          strict=True)  # fmt: skip
            texts = ["" if value is None else format(value, form) for value, form in numbers]
            found.append([str(one.layer), *texts, "chosen" if one is best else one.dropped])
        return found

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values; also what was chosen, and why the others were not."""
        return {
            "key": self.key,
            "method": self.method,
            "layers": self.layers,
            "chosen": self.chosen.layer if self.chosen else None,
            "scores": [{**asdict(one), "dropped": one.dropped} for one in self.scores],
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "LayerSelection":
        """The inverse of `to_json`."""
        scores = []
        for one in values["scores"]:
            own = {name: value for name, value in one.items() if name != "dropped"}
            scores.append(LayerScores(**{**own, "base": tuple(one["base"])}))
        return cls(values["key"], values["method"], values["layers"], tuple(scores))
