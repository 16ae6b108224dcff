"""Direction methods beside each other, from residuals that are read one layer at a time."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

import numpy
import torch
from jaxtyping import Float

from ray_abliterate.directions.comparison.fitting import ContrastSets
from ray_abliterate.directions.comparison.held_out import HeldOut, measure_held_out, random_halves
from ray_abliterate.directions.comparison.recommendation import (
    MethodCandidate,
    Recommendation,
    recommend_method,
)
from ray_abliterate.directions.comparison.stability import Stability, measure_stability, reliability
from ray_abliterate.directions.layer_separation import best_layer
from ray_abliterate.directions.residuals.shard import LayerValues, winsorized
from ray_abliterate.recipe import DirectionSettings

MethodRow = Mapping[str, float | int]
Step = Callable[[int, int], None]


@runtime_checkable
class LayerwiseResiduals(Protocol):
    """One prompt set's residuals, of which a layer can be had."""

    @property
    def layers(self) -> int:
        """Number of blocks."""

    def layer(self, index: int) -> LayerValues:
        """Residuals after one block."""


@dataclass(frozen=True)
class MethodComparison:
    """What was found.

    Attributes:
        counts: Prompts of the behaviour, and neutral ones.
        layers: Number of blocks.
        hidden: Width of the stream.
        separation: By method, a row per layer: `separability.measures`, the agreement of the two
            halves' directions, and `layer`; None where the method has no direction.
        cosines: Per layer, of all methods with each other, as absolute values are not; not a number
            where one has no direction.
        layer_cosines: Of the recommended method's directions at all layers with each other.
        layer: Where samples were drawn, and whose cosines are shown first: the best one of the
            method that was asked for first.
        stability: By method, at that layer.
        failed: Methods without any direction, and why.
        advice: What to take.
    """

    counts: tuple[int, int]
    layers: int
    hidden: int
    separation: Mapping[str, Sequence[MethodRow | None]]
    cosines: Sequence[Float[numpy.ndarray, "method method"]]
    layer_cosines: Float[numpy.ndarray, "layer layer"]
    layer: int
    stability: Mapping[str, tuple[Stability, ...]]
    failed: Mapping[str, str]
    advice: Recommendation

    @property
    def methods(self) -> tuple[str, ...]:
        """Those that found something."""
        return tuple(self.separation)

    def best(self, method: str) -> MethodRow:
        """A method's row at its own best layer."""
        return best_row(self.separation[method])

    def steady(self, method: str) -> float:
        """Cosine with the direction of infinitely many prompts, about."""
        return reliability(self.stability[method], min(self.counts))

    @property
    def mean_cosines(self) -> Float[numpy.ndarray, "method method"]:
        """Over the layers where both methods have a direction."""
        stack = numpy.stack(list(self.cosines))
        there = ~numpy.isnan(stack)
        total = numpy.where(there, stack, 0.0).sum(axis=0)
        mean: Float[numpy.ndarray, "method method"] = numpy.where(
            there.any(axis=0), total / numpy.maximum(there.sum(axis=0), 1), numpy.nan
        )
        return mean

    def to_json(self) -> dict[str, Any]:
        """Plain values; None where there is no number."""
        return {
            "prompts": list(self.counts),
            "layers": self.layers,
            "hidden": self.hidden,
            "methods": list(self.methods),
            "failed": dict(self.failed),
            "layer": self.layer,
            "separation": {name: list(rows) for name, rows in self.separation.items()},
            "cosines": [_plain(matrix) for matrix in self.cosines],
            "layer_cosines": _plain(self.layer_cosines),
            "mean_cosines": _plain(self.mean_cosines),
            "stability": {
                name: [
                    {"prompts": p.prompts, "cosine": p.mean if p.cosines else None,
                     "pairs": list(p.cosines)}
                    for p in points
                ]
                for name, points in self.stability.items()
            },
            "reliability": {name: _number(self.steady(name)) for name in self.methods},
            "advice": asdict(self.advice),
        }  # fmt: skip


def compare_methods(
    behaviour: LayerwiseResiduals,
    neutral: LayerwiseResiduals,
    methods: Mapping[str, DirectionSettings],
    pairs: int = 8,
    seed: int = 0,
    step: Step = lambda done, total: None,
) -> MethodComparison:
    """Compare methods; in memory is one layer of both sets, and what methods make of it.

    Args:
        behaviour: Residuals of prompts that show the behaviour.
        neutral: Of prompts that don't.
        methods: By name, simplest first.
        pairs: Pairs of samples of each size, for stability.
        seed: Decides halves and samples.
        step: Is told how much is done.

    Raises:
        ValueError: no method has a direction anywhere; says why the first has none.
    """
    layers, total = behaviour.layers, behaviour.layers + len(methods)
    rows: dict[str, list[MethodRow | None]] = {name: [] for name in methods}
    problems: dict[str, str] = {}
    vectors, sets = [], None
    for index in range(layers):
        sets = _sets(behaviour, neutral, index, methods)
        vectors.append(
            [_one(sets, name, settings, index, rows, problems, seed)
             for name, settings in methods.items()]
        )  # fmt: skip
        step(index + 1, total)
    assert sets is not None
    kept = {name: found for name, found in rows.items() if any(found)}
    if not kept:
        raise ValueError(next(iter(problems.values()), "the two sets don't differ in any layer"))
    where = [place for place, name in enumerate(methods) if name in kept]
    layer = int(best_row(next(iter(kept.values())))["layer"])
    sampled = _sets(behaviour, neutral, layer, methods)
    steady = {}
    for done, name in enumerate(kept, start=layers + 1):
        steady[name] = measure_stability(sampled, methods[name], pairs, seed)
        step(done, total)
    standings = {
        name: MethodCandidate(int(best["layer"]), best["auroc"], steady[name])
        for name, best in ((name, best_row(found)) for name, found in kept.items())
    }
    advice = recommend_method(standings, sets.counts)
    chosen = list(methods).index(advice.method)
    return MethodComparison(
        counts=sets.counts,
        layers=layers,
        hidden=sets.behaviour.shape[1],
        separation=kept,
        cosines=[_cosines([found[place] for place in where]) for found in vectors],
        layer_cosines=_cosines([found[chosen] for found in vectors]),
        layer=layer,
        stability=steady,
        failed={name: problems.get(name, "") for name in methods if name not in kept},
        advice=advice,
    )


def best_row(rows: Sequence[MethodRow | None]) -> MethodRow:
    """The row of the layer that separates best; see `directions.best_layer`.

    Raises:
        ValueError: there is no row.
    """
    known = [row for row in rows if row is not None]
    if not known:
        raise ValueError("no layer has a direction")
    filled = [row or {"layer": place, "fisher": -1.0} for place, row in enumerate(rows)]
    chosen = rows[best_layer(filled)]
    return chosen if chosen is not None else max(known, key=lambda row: row["fisher"])


def _sets(
    behaviour: LayerwiseResiduals,
    neutral: LayerwiseResiduals,
    index: int,
    methods: Mapping[str, DirectionSettings],
) -> ContrastSets:
    quantile = next(iter(methods.values())).winsorize_quantile
    rows = (winsorized(s.layer(index), quantile) for s in (behaviour, neutral))
    return ContrastSets(*(torch.from_numpy(numpy.array(values)) for values in rows))


def _one(
    sets: ContrastSets,
    name: str,
    settings: DirectionSettings,
    index: int,
    rows: dict[str, list[MethodRow | None]],
    problems: dict[str, str],
    seed: int,
) -> Any:
    """One method at one layer: its row, and its direction in the stream's own units."""
    if not sets.differ:
        rows[name].append(None)
        return None
    measured, found = (
        measure_held_out(sets, settings, random_halves(sets.counts, seed)),
        sets.fit(settings),
    )
    if isinstance(measured, HeldOut) and found.vector is not None:
        rows[name].append({"layer": index, **measured.measures()})
        _, basis = sets.axes(settings)
        return found.vector if basis is None else basis @ found.vector
    problems[name] = found.problem or getattr(measured, "problem", "")
    rows[name].append(None)
    return None


def _cosines(vectors: Sequence[Any]) -> Float[numpy.ndarray, "row row"]:
    found = numpy.full((len(vectors), len(vectors)), numpy.nan)
    for i, one in enumerate(vectors):
        for j, other in enumerate(vectors):
            if one is not None and other is not None:
                found[i, j] = float(one @ other)
    return found


def _number(value: float) -> float | None:
    return None if numpy.isnan(value) else float(value)


def _plain(matrix: Float[numpy.ndarray, "row row"]) -> list[list[float | None]]:
    return [[_number(value) for value in row] for row in matrix]
