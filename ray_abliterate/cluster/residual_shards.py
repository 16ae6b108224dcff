"""Residuals in the object store: made batch by batch by the replicas, reduced where they lie.

The driver holds references. It fetches a shard only to write it to a file, one at a time. For a
direction method that wants more than means and variances it fetches residuals, one layer at a time.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from operator import add
from typing import Any

import torch

from ray_abliterate import __version__
from ray_abliterate.data.prompts import PromptSet
from ray_abliterate.directions import compute, layer_separation
from ray_abliterate.directions.comparison.cross_fitting import REDUCED, along_others
from ray_abliterate.directions.directions import Directions, NoDirection
from ray_abliterate.directions.layer_separation import Projected
from ray_abliterate.directions.methods.inputs import Layer, Sample, Summary
from ray_abliterate.directions.residuals.moments import Moments, Pairs, rows_of
from ray_abliterate.directions.residuals.residual_set import Residuals, join
from ray_abliterate.directions.residuals.shard import ResidualShard, Sums, content_key, sums_of
from ray_abliterate.directions.residuals.shard_files import ShardFiles
from ray_abliterate.directions.residuals.subspace import space_of
from ray_abliterate.errors import SearchError
from ray_abliterate.model.batch_size import Tuning, steady
from ray_abliterate.pipeline.progress import Watch
from ray_abliterate.recipe import DirectionSettings, Recipe
from ray_abliterate.replica.messages import ModelFacts

log = logging.getLogger(__name__)

ATTEMPTS = 3
"""Times that lost shards are made again in one reduction."""

Place = tuple[str, int]
"""Prompt set, and number of the batch."""


@dataclass(frozen=True)
class Extraction:
    """How residuals are read. With model and prompts, all that decides their bits."""

    rows: int
    response_prefix: tuple[int, ...]
    dtype: str
    tuning: Tuning
    positions: int = 1
    per_component: bool = False

    @classmethod
    def of(cls, recipe: Recipe, prefix: tuple[int, ...], tuning: Tuning) -> "Extraction":
        """The recipe's batches, or those that memory allows.

        The latter are rounded (`batch_size.steady`), so that runs can use each other's shards.
        """
        rows = tuning.read_rows
        if recipe.run.batch_size is None:
            rows = steady(rows)
        settings = recipe.direction
        return cls(
            rows, prefix, settings.residual_dtype, tuning, settings.positions,
            settings.per_component,
        )  # fmt: skip

    def key(self, facts: ModelFacts, prompts: PromptSet) -> str:
        """Content key of one set's shards."""
        return content_key(
            weights=facts.fingerprint,
            revision=facts.revision,
            model_dtype=facts.dtype,
            computes=facts.computes,
            template=facts.template,
            set=prompts.name,
            prompts=prompts.fingerprint,
            response_prefix=self.response_prefix,
            rows=self.rows,
            dtype=self.dtype,
            versions=[__version__, version("torch"), version("transformers")],
            **({"positions": self.positions} if self.positions > 1 else {}),
            **({"components": facts.shape.components} if self.per_component else {}),
        )


class Shards:
    """The shards of a run's two prompt sets, by reference."""

    def __init__(
        self,
        pool: Any,
        files: ShardFiles,
        extraction: Extraction,
        behaviour: PromptSet,
        neutral: PromptSet,
    ) -> None:
        """Make nothing yet.

        Args:
            pool: The replicas.
            files: Where shards are found and kept.
            extraction: How residuals are read.
            behaviour: Prompts that show the behaviour.
            neutral: Prompts that don't.
        """
        self._pool = pool
        self._files = files
        self._sets = behaviour, neutral
        self._positions = extraction.positions
        self._components = pool.facts.shape.components if extraction.per_component else ()
        self._keys = {s.name: extraction.key(pool.facts, s) for s in self._sets}
        rows, prefix, tuning = extraction.rows, extraction.response_prefix, extraction.tuning
        self._calls: dict[Place, tuple[Any, ...]] = {
            (s.name, number): (s.name, number * rows, prompts, prefix, tuning)
            for s in self._sets
            for number, prompts in s.batches(rows)
        }
        self._references: dict[Place, Any] = {}
        self._made: set[Place] = set()

    def extract(self, watch: Watch) -> None:
        """Take up the shards that were kept, and have the replicas make the others."""
        for name, number in self._calls:
            shard = self._files.find(name, number, self._keys[name])
            if shard is not None:
                self._references[name, number] = self._pool.store.put(shard.batch)
                watch.step(len(self._references), len(self._calls))
        missing = [place for place in self._calls if place not in self._references]
        self._make(missing, lambda: watch.step(len(self._references), len(self._calls)))

    def facts(self) -> dict[str, dict[str, Any]]:
        """Of each set: its content key, its shards, and those that were there already."""
        return {
            s.name: {
                "key": self._keys[s.name],
                "shards": len(self._places(s.name)),
                "reused": sum(place not in self._made for place in self._places(s.name)),
            }
            for s in self._sets
        }

    def directions(self, settings: DirectionSettings) -> Directions:
        """The directions; of several token positions those that tell the sets apart best.

        With those of components at the same position, if what these add to the stream was read.

        Raises:
            NoDirection: no layer has one, at no position.
        """
        found = dict[int, Directions]()
        for place in range(self._positions):
            try:
                own = self._directions(settings, self._columns(place))
            except NoDirection:
                if not found and place + 1 == self._positions:
                    raise
                continue
            found[place] = own if self._positions == 1 else own.at_position(-1 - place)
        best, components = min(found), {}
        if len(found) > 1:
            rows = {place: self.separation(own, settings) for place, own in found.items()}
            best = layer_separation.best_position(rows)
        for number, name in enumerate(self._components, start=1):
            try:
                components[name] = self._directions(settings, self._columns(best, number))
            except NoDirection:
                log.warning(
                    "what %s adds to the stream is the same for both sets in every layer: it is "
                    "edited with the stream's own directions",
                    name,
                )
        return found[best].with_components(components)

    def _columns(self, place: int, number: int = 0) -> range:
        """Layers of the stream, or of a component by its number, at a token counted from the end.

        As shards have them: of every position first the stream, then the components.
        """
        layers = self._pool.facts.shape.layers
        first = layers * (place * (1 + len(self._components)) + number)
        return range(first, first + layers)

    def _directions(self, settings: DirectionSettings, columns: range) -> Directions:
        """The directions of some columns of the shards, from as much as the method needs.

        Means and variances are reduced where the residuals are. Of anything else, one layer at a
        time is here: as covariances that grow with no prompt, or as the layer's residuals.
        """
        behaviour, neutral = self._sets
        origin = {"behaviour": behaviour.fingerprint, "neutral": neutral.fingerprint}
        quantile = settings.winsorize_quantile
        need = compute.need_of(settings)
        if need in REDUCED:
            function, find = REDUCED[need]
            sides = [self._reduced(s.name, function, quantile, columns) for s in self._sets]
            return find(sides[0], sides[1], settings, origin)
        space = space_of(len(behaviour) + len(neutral), self._pool.facts.shape.hidden)
        summed = need == "covariances" and space.kind == "covariance"
        how = space.reason if need == "covariances" else "layer by layer from all residuals"
        fetched = self._layers(quantile, summed, columns)
        return compute.from_layers(fetched, settings, {**origin, "statistics": how})

    def _layers(self, quantile: float, summed: bool, columns: range) -> Iterator[Layer]:
        """Both sets layer by layer, as covariances or as residuals."""
        shape = self._pool.facts.shape
        for layer in columns:
            if summed:
                start = Pairs(Moments.nothing(shape.hidden))
                yield Layer(
                    *(
                        Summary(
                            self._reduced(s.name, rows_of, layer, quantile, start=start).moments
                        )
                        for s in self._sets
                    )
                )
            else:
                rows = [self._reduced(s.name, rows_of, layer, quantile) for s in self._sets]
                values = (torch.from_numpy(part.values) for part in rows)
                yield Layer(*(Sample(value, shape.hidden) for value in values))

    def separation(self, directions: Directions, settings: DirectionSettings) -> list[Any]:
        """How well each layer's direction tells the two sets apart, on prompts held out.

        Args:
            directions: Those of all prompts.
            settings: How they were found; those of folds are found so, too.
        """
        place = -1 - int(directions.origin.get("position", -1))
        columns = self._columns(place)
        along = along_others(self._reduced, self._sets, settings, columns)
        sums = [self.sums(s.name, columns=columns) for s in self._sets]
        sides = [Projected(*both) for both in zip(sums, along, strict=True)]
        return layer_separation.separation(sides[0], sides[1], directions)

    def sums(self, name: str, quantile: float = 1.0, columns: range | None = None) -> Sums:
        """Count and sum of one set, of all columns or some."""
        found: Sums = self._reduced(name, sums_of, quantile, columns)
        return found

    def gathered(self, prompts: PromptSet) -> Residuals:
        """The residuals of one set, all here."""
        shards = []
        for place in self._places(prompts.name):
            for _ in range(ATTEMPTS):
                batch = self._pool.store.fetch(self._references[place])
                if batch is not None:
                    shards.append(ResidualShard(batch))
                    break
                self._make([place])
            else:
                raise _lost([place])
        return join(shards, prompts.fingerprint)

    def _reduced(
        self, name: str, function: Callable[..., Any], *args: Any, start: Any = None
    ) -> Any:
        """`function` of every shard where it lies, added up in the order of the shards.

        What comes is added as soon as all before it has come, and kept no longer; to `start`, if
        there is one.
        """
        left, early, total = self._places(name), dict[Place, Any](), start
        for _ in range(ATTEMPTS):
            missing = {place: self._references[place] for place in left if place not in early}
            for place, part in self._pool.store.each(function, missing, *args):
                if part is not None:
                    early[place] = part
                while left and left[0] in early:
                    part = early.pop(left.pop(0))
                    total = part if total is None else add(total, part)
            if not left:
                return total
            lost = [place for place in left if place not in early]
            self._make(lost)
        raise _lost(lost)

    def _make(self, places: list[Place], made: Callable[[], None] = lambda: None) -> None:
        """Have the replicas make shards, and keep each as it comes."""
        calls = [self._calls[place] for place in places]
        for index, reference in self._pool.map_by_reference("residuals", calls):
            name, number = places[index]
            self._references[name, number] = reference
            self._made.add((name, number))
            batch = self._pool.store.fetch(reference) if self._files.kept else None
            if batch is not None:
                self._files.keep(ResidualShard(batch), number, self._keys[name])
            made()

    def _places(self, name: str) -> list[Place]:
        return [place for place in self._calls if place[0] == name]


def _lost(places: Iterable[Place]) -> SearchError:
    return SearchError(
        f"residuals were lost {ATTEMPTS} times with the machines that held them: {list(places)}.\n"
        "  Resume the run once the cluster is stable."
    )
