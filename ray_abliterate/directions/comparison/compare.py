"""Compares direction methods on residuals that are read one layer at a time."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

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
    """Residuals of one prompt set, from which one layer at a time can be read."""

    @property
    def layers(self) -> int:
        """The number of blocks that can be read."""

    def layer(self, index: int) -> LayerValues:
        """Return the residuals after one block."""


@dataclass(frozen=True)
class MethodComparison:
    """How the methods that were compared do on the same residuals.

    Attributes:
        counts: Prompts of the behaviour, and neutral ones.
        layers: Number of blocks.
        hidden: Width of the stream.
        separation: By method, a row per layer: `measure_separability`, the agreement of the two
            halves' directions, and `layer`; None where the method has no direction.
        cosines: For each layer, the signed cosines of all methods with each other; not a number
            where one has no direction.
        layer_cosines: Cosines of the recommended method's directions at all layers.
        layer: The layer at which stability was measured, and whose cosines are shown first: the
            best one of the first method that has a direction.
        stability: By method, at that layer.
        failed: Methods without any direction, and why.
        advice: The recommended method, and why.
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
        """The methods that have a direction, in the order they were given."""
        return tuple(self.separation)

    def best(self, method: str) -> MethodRow:
        """Return a method's row at its own best layer."""
        return best_row(self.separation[method])

    def reliability_of(self, method: str) -> float:
        """Estimate a method's cosine with its own direction from infinitely many prompts."""
        return reliability(self.stability[method], min(self.counts))

    @property
    def mean_cosines(self) -> Float[numpy.ndarray, "method method"]:
        """Mean cosines of the methods over the layers where both have a direction."""
        stack = numpy.stack(list(self.cosines))  # (layer, method, method)
        known = ~numpy.isnan(stack)
        total = numpy.where(known, stack, 0.0).sum(axis=0)
        mean: Float[numpy.ndarray, "method method"] = numpy.where(
            known.any(axis=0), total / numpy.maximum(known.sum(axis=0), 1), numpy.nan
        )
        return mean

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; None where there is no number."""
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
            "reliability": {name: _number(self.reliability_of(name)) for name in self.methods},
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
        neutral: Residuals of prompts that don't.
        methods: Settings by name, simplest method first.
        pairs: Pairs of samples of each size, for stability.
        seed: Decides halves and samples.
        step: Receives how many steps are done, of how many.

    Raises:
        ValueError: no method has a direction anywhere; says why the first has none.
    """
    layers, total = behaviour.layers, behaviour.layers + len(methods)
    rows: dict[str, list[MethodRow | None]] = {name: [] for name in methods}
    problems: dict[str, str] = {}
    vectors: list[list[Any]] = []  # by layer, then by method
    sets = None
    for index in range(layers):
        sets = _sets_at(behaviour, neutral, index, methods)
        vectors.append([])
        for name, settings in methods.items():
            measures, vector, problem = _measure_method(sets, settings, seed)
            rows[name].append(None if measures is None else {"layer": index, **measures})
            vectors[-1].append(vector)
            if problem:
                problems[name] = problem
        step(index + 1, total)
    assert sets is not None
    separation = {name: by_layer for name, by_layer in rows.items() if any(by_layer)}
    if not separation:
        raise ValueError(next(iter(problems.values()), "the two sets don't differ in any layer"))
    columns = [column for column, name in enumerate(methods) if name in separation]
    layer = int(best_row(next(iter(separation.values())))["layer"])
    sets_at_best = _sets_at(behaviour, neutral, layer, methods)
    stability = {}
    for done, name in enumerate(separation, start=layers + 1):
        stability[name] = measure_stability(sets_at_best, methods[name], pairs, seed)
        step(done, total)
    candidates = {
        name: MethodCandidate(int(best["layer"]), best["auroc"], stability[name])
        for name, best in ((name, best_row(by_layer)) for name, by_layer in separation.items())
    }
    advice = recommend_method(candidates, sets.counts)
    recommended = list(methods).index(advice.method)
    return MethodComparison(
        counts=sets.counts,
        layers=layers,
        hidden=sets.behaviour.shape[1],
        separation=separation,
        cosines=[_cosines([at_layer[column] for column in columns]) for at_layer in vectors],
        layer_cosines=_cosines([at_layer[recommended] for at_layer in vectors]),
        layer=layer,
        stability=stability,
        failed={name: problems.get(name, "") for name in methods if name not in separation},
        advice=advice,
    )


def best_row(rows: Sequence[MethodRow | None]) -> MethodRow:
    """Return the row of the layer that separates best; see `layer_separation.best_layer`.

    Raises:
        ValueError: no layer has a row.
    """
    known = [row for row in rows if row is not None]
    if not known:
        raise ValueError("no layer has a direction")
    # layers without a direction rank last
    filled = [row or {"layer": layer, "fisher": -1.0} for layer, row in enumerate(rows)]
    chosen = rows[best_layer(filled)]
    return chosen if chosen is not None else max(known, key=lambda row: row["fisher"])


def _sets_at(
    behaviour: LayerwiseResiduals,
    neutral: LayerwiseResiduals,
    layer: int,
    methods: Mapping[str, DirectionSettings],
) -> ContrastSets:
    """Read one layer of both sets, winsorised as the first method's settings ask."""
    quantile = next(iter(methods.values())).winsorize_quantile
    rows = (winsorized(s.layer(layer), quantile) for s in (behaviour, neutral))
    return ContrastSets(*(torch.from_numpy(numpy.array(values)) for values in rows))


class _MethodAtLayer(NamedTuple):
    """What one method does at one layer: measures and direction, or why it has none."""

    measures: dict[str, float] | None = None
    vector: Float[torch.Tensor, " hidden"] | None = None
    problem: str = ""


def _measure_method(sets: ContrastSets, settings: DirectionSettings, seed: int) -> _MethodAtLayer:
    """Measure one method at one layer; where the sets' means are the same, there is nothing."""
    if not sets.means_differ:
        return _MethodAtLayer()
    held_out = measure_held_out(sets, settings, random_halves(sets.counts, seed))
    fitted = sets.fit(settings)
    if isinstance(held_out, HeldOut) and fitted.vector is not None:
        _, basis = sets.axes(settings)
        # in units of the stream, so that methods that were fitted along other axes compare
        vector = fitted.vector if basis is None else basis @ fitted.vector
        return _MethodAtLayer(held_out.measures(), vector)
    return _MethodAtLayer(problem=fitted.problem or getattr(held_out, "problem", ""))


def _cosines(vectors: Sequence[Any]) -> Float[numpy.ndarray, "row row"]:
    cosines = numpy.full((len(vectors), len(vectors)), numpy.nan)
    for i, one in enumerate(vectors):
        for j, other in enumerate(vectors):
            if one is not None and other is not None:
                cosines[i, j] = float(one @ other)
    return cosines


def _number(value: float) -> float | None:
    return None if numpy.isnan(value) else float(value)


def _plain(matrix: Float[numpy.ndarray, "row row"]) -> list[list[float | None]]:
    return [[_number(value) for value in row] for row in matrix]
