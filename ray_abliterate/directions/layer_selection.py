"""Selects the layer whose direction a search begins with, by its effects on held-out prompts.

The effects of removing and of adding it are those of Arditi et al. (2024, arXiv 2406.11717, section
2.3 and appendix C). Holds numbers only: `replica/direction_effects.py` measures them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

MOST_DIVERGENCE = 0.1
"""Most KL divergence of neutral prompts at the first token of answers, in nats: the paper's."""
LAST_SHARE = 0.2
"""Share of the layers, from the end, that are not tried: they prepare the next token rather than
carry the behaviour (the paper's)."""
TABLE_HEADER = ("layer", "removed: log-odds", "added: log-odds", "divergence (nats)", "")


def tried_layers(usable: Sequence[bool]) -> tuple[int, ...]:
    """Return the layers that have a direction, without the last fifth of all layers."""
    first = max(1, math.ceil((1 - LAST_SHARE) * len(usable)))
    return tuple(layer for layer in range(first) if usable[layer])


@dataclass(frozen=True)
class LayerScores:
    """The effects of one layer's direction.

    Log-odds are in nats: above 0, the beginning of a refusal is likelier than all else.

    Attributes:
        layer: The layer where the direction was found.
        ablated: Mean log-odds of refusing `behaviour` prompts with the direction removed
            everywhere.
        added: Mean log-odds of refusing neutral prompts with the direction added after its layer,
            as long as the gap between the sets' means along it.
        divergence: Mean KL divergence at neutral prompts with it removed, in nats.
        base: Mean log-odds of the base model, at `behaviour` prompts and at neutral ones.
        problem: Why there are no numbers, which are None then.
    """

    layer: int
    ablated: float | None
    added: float | None
    divergence: float | None
    base: tuple[float, float]
    problem: str = ""

    @property
    def rejection(self) -> str:
        """Why this layer can't be chosen; empty if it can be."""
        if self.ablated is None or self.added is None or self.divergence is None:
            return self.problem
        if self.added <= 0:
            return "adding it does not cause refusals"
        if self.divergence > MOST_DIVERGENCE:
            return f"changes neutral prompts by more than {MOST_DIVERGENCE:g}"
        return ""


@dataclass(frozen=True)
class LayerSelection:
    """The layers that were tried, and the one that is chosen.

    Attributes:
        key: Content key of all that the scores depend on; with another key they are measured again.
        method: The method that found the directions.
        layers: The number of layers of the model.
        scores: The effects of each layer that was tried, by layer.
    """

    key: str
    method: str
    layers: int
    scores: tuple[LayerScores, ...]

    @property
    def chosen(self) -> LayerScores | None:
        """The passing layer that leaves the least log-odds of refusing; None if none passes.

        Of equal layers it is the first.
        """
        passing = [scores for scores in self.scores if not scores.rejection]
        return min(passing, key=lambda scores: (scores.ablated, scores.layer), default=None)

    def sentence(self) -> str:
        """Return the result as a sentence for people."""
        best = self.chosen
        if best is None:
            return (
                f"By log-odds on held-out prompts, the direction ({self.method}) of none of the "
                f"{len(self.scores)} layers passes."
            )
        return (
            f"By log-odds on held-out prompts, layer {best.layer} has the best direction "
            f"({self.method}): removing it takes refusals from {best.base[0]:.2f} to "
            f"{best.ablated:.2f} nats, and changes neutral prompts by {best.divergence:.3f} nats."
        )

    def rows(self) -> list[list[str]]:
        """Return rows of a table under `TABLE_HEADER`: the base model, then each layer tried."""
        best = self.chosen
        base = self.scores[0].base if self.scores else (math.nan, math.nan)
        rows = [["base model", f"{base[0]:.2f}", f"{base[1]:.2f}", "", ""]]
        for scores in self.scores:
            values = scores.ablated, scores.added, scores.divergence
            texts = [
                "" if value is None else format(value, form)
                for value, form in zip(values, (".2f", ".2f", ".3f"), strict=True)
            ]
            verdict = "chosen" if scores is best else scores.rejection
            rows.append([str(scores.layer), *texts, verdict])
        return rows

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values, with the chosen layer and why others were rejected."""
        return {
            "key": self.key,
            "method": self.method,
            "layers": self.layers,
            "chosen": self.chosen.layer if self.chosen else None,
            "scores": [{**asdict(scores), "dropped": scores.rejection} for scores in self.scores],
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "LayerSelection":
        """Parse `to_json`'s values, from which the verdicts follow again."""
        scores = []
        for row in values["scores"]:
            fields = {name: value for name, value in row.items() if name != "dropped"}
            scores.append(LayerScores(**{**fields, "base": tuple(row["base"])}))
        return cls(values["key"], values["method"], values["layers"], tuple(scores))
