"""Residuals in the object store: replicas extract them batch by batch; each node reduces its own.

The driver holds references. It fetches a shard only to write it to a file, one at a time. For a
direction method that needs more than means and variances it fetches residuals, one layer at a time.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from operator import add
from typing import Any, Concatenate

import torch
from pyarrow import RecordBatch

from ray_abliterate.cluster.object_store import Computed, MoreArguments, Reference
from ray_abliterate.cluster.pool import ReplicaPool
from ray_abliterate.data.prompts import Prompt, PromptSet
from ray_abliterate.directions import compute, layer_separation
from ray_abliterate.directions.comparison.cross_fitting import (
    REDUCIBLE_NEEDS,
    cross_fitted_coordinates,
)
from ray_abliterate.directions.directions import Directions, NoDirection
from ray_abliterate.directions.layer_separation import ProjectedSet
from ray_abliterate.directions.methods.inputs import Layer, Sample, Summary
from ray_abliterate.directions.methods.recipe_methods import need_of
from ray_abliterate.directions.residuals.moments import Moments, PairedMoments, rows_of
from ray_abliterate.directions.residuals.residual_set import Residuals, join
from ray_abliterate.directions.residuals.shard import ResidualShard, Sums, content_key, sums_of
from ray_abliterate.directions.residuals.shard_files import ShardFiles
from ray_abliterate.directions.residuals.subspace import choose_subspace
from ray_abliterate.errors import SearchError
from ray_abliterate.model.batch_size import Tuning, largest_power_of_two
from ray_abliterate.recipe import DirectionSettings, Recipe
from ray_abliterate.replica.messages import ModelFacts, ReplicaApi
from ray_abliterate.version import __version__

log = logging.getLogger(__name__)

ATTEMPTS = 3
"""How often one reduction has lost shards extracted again."""

ShardId = tuple[str, int]
"""Name of the prompt set, and number of the batch."""
ExtractionCall = tuple[str, int, tuple[Prompt, ...], tuple[int, ...], Tuning]
"""Arguments of `ReplicaApi.extract_residuals`."""


@dataclass(frozen=True)
class ExtractionSettings:
    """How residuals are extracted. With model and prompts, all that decides their bits.

    Attributes:
        rows: Prompts of a batch: the rows of a shard.
        response_prefix: Tokens after each prompt.
        dtype: The dtype of the shards.
        tuning: How to compute.
        positions: Token positions, counted from the end of the prompt.
        per_component: Extract also what each component adds to the residual stream.
    """

    rows: int
    response_prefix: tuple[int, ...]
    dtype: str
    tuning: Tuning
    positions: int = 1
    per_component: bool = False

    @classmethod
    def of(cls, recipe: Recipe, prefix: tuple[int, ...], tuning: Tuning) -> "ExtractionSettings":
        """Take the recipe's batch size, or the one that memory allows.

        The latter is rounded (`largest_power_of_two`), so that runs can use each other's shards.
        """
        rows = tuning.read_rows
        if recipe.run.batch_size is None:
            rows = largest_power_of_two(rows)
        settings = recipe.direction
        return cls(
            rows, prefix, settings.residual_dtype, tuning, settings.positions,
            settings.per_component,
        )  # fmt: skip

    def key(self, facts: ModelFacts, prompts: PromptSet) -> str:
        """Return the content key of one set's shards."""
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


class ResidualShards:
    """The shards of a run's two prompt sets, by reference."""

    def __init__(
        self,
        pool: ReplicaPool,
        files: ShardFiles,
        extraction: ExtractionSettings,
        behaviour: PromptSet,
        neutral: PromptSet,
    ) -> None:
        """Extract nothing yet.

        Args:
            pool: The replicas.
            files: Where shards are stored, and looked up.
            extraction: How residuals are extracted.
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
        self._calls: dict[ShardId, ExtractionCall] = {
            (s.name, number): (s.name, number * rows, prompts, prefix, tuning)
            for s in self._sets
            for number, prompts in s.batches(rows)
        }
        self._references: dict[ShardId, Reference[RecordBatch]] = {}
        self._extracted: set[ShardId] = set()

    def extract(self, step: Callable[[int, int], None]) -> None:
        """Read the shards that are stored, and have the replicas extract the others.

        Args:
            step: Called with the number of shards so far, and of all.
        """
        for name, number in self._calls:
            shard = self._files.find(name, number, self._keys[name])
            if shard is not None:
                self._references[name, number] = self._pool.store.put(shard.batch)
                step(len(self._references), len(self._calls))
        missing = [shard_id for shard_id in self._calls if shard_id not in self._references]
        self._extract(missing, lambda: step(len(self._references), len(self._calls)))

    def facts(self) -> dict[str, dict[str, Any]]:
        """Return for each set its content key, its shards, and those of them that were stored."""
        return {
            s.name: {
                "key": self._keys[s.name],
                "shards": len(self._ids(s.name)),
                "reused": sum(own not in self._extracted for own in self._ids(s.name)),
            }
            for s in self._sets
        }

    def directions(self, settings: DirectionSettings) -> Directions:
        """Find the directions; of several token positions, at the one that separates the sets best.

        With those of components at the same position, if what they add to the stream was extracted.

        Raises:
            NoDirection: no layer has one, at no position.
        """
        by_position = dict[int, Directions]()
        for position in range(self._positions):
            try:
                own = self._directions(settings, self._columns(position))
            except NoDirection:
                if not by_position and position + 1 == self._positions:
                    raise
                continue
            by_position[position] = (
                own if self._positions == 1 else own.with_position(-1 - position)
            )
        best, components = min(by_position), {}
        if len(by_position) > 1:
            rows = {at: self.separation(own, settings) for at, own in by_position.items()}
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
        return by_position[best].with_components(components)

    def _columns(self, position: int, number: int = 0) -> range:
        """Return the shards' columns for all layers of the stream, or of a component.

        A shard holds for each position first the stream, then the components.

        Args:
            position: Token, counted from the end of the prompt.
            number: Of the component, from 1; 0 for the stream.
        """
        layers = self._pool.facts.shape.layers
        first = layers * (position * (1 + len(self._components)) + number)
        return range(first, first + layers)

    def _directions(self, settings: DirectionSettings, columns: range) -> Directions:
        """Find directions in some columns of the shards, from no more than the method needs.

        Means and variances are reduced where the residuals are. Anything else is fetched one layer
        at a time: as covariances, whose size is that of no prompt set, or as the layer's residuals.
        """
        behaviour, neutral = self._sets
        origin = {"behaviour": behaviour.fingerprint, "neutral": neutral.fingerprint}
        quantile = settings.winsorize_quantile
        need = need_of(settings)
        if need in REDUCIBLE_NEEDS:
            function, find = REDUCIBLE_NEEDS[need]
            sides = [self._reduced(s.name, function, quantile, columns) for s in self._sets]
            return find(sides[0], sides[1], settings, origin)
        space = choose_subspace(len(behaviour) + len(neutral), self._pool.facts.shape.hidden)
        summed = need == "covariances" and space.kind == "covariance"
        how = space.reason if need == "covariances" else "layer by layer from all residuals"
        fetched = self._layers(quantile, summed, columns)
        return compute.directions_from_layers(fetched, settings, {**origin, "statistics": how})

    def _layers(self, quantile: float, summed: bool, columns: range) -> Iterator[Layer]:
        """Yield both sets layer by layer, as covariances (`summed`) or as residuals."""
        shape = self._pool.facts.shape
        for layer in columns:
            if summed:
                start = PairedMoments(Moments.empty(shape.hidden))
                yield Layer(
                    *(
                        Summary(self._added(s.name, rows_of, start, layer, quantile).moments)
                        for s in self._sets
                    )
                )
            else:
                rows = [self._reduced(s.name, rows_of, layer, quantile) for s in self._sets]
                values = (torch.from_numpy(part.values) for part in rows)
                yield Layer(*(Sample(value, shape.hidden) for value in values))

    def separation(self, directions: Directions, settings: DirectionSettings) -> list[Any]:
        """Measure how well each layer's direction separates the two sets, on held-out prompts.

        Args:
            directions: Directions from all prompts.
            settings: How they were found; those of the folds are found in the same way.
        """
        columns = self._columns(-1 - int(directions.origin.get("position", -1)))
        along = cross_fitted_coordinates(self._reduced, self._sets, settings, columns)
        sums = [self.sums(s.name, columns=columns) for s in self._sets]
        sides = [ProjectedSet(*both) for both in zip(sums, along, strict=True)]
        return layer_separation.measure_layer_separation(sides[0], sides[1], directions)

    def sums(self, name: str, quantile: float = 1.0, columns: range | None = None) -> Sums:
        """Return count and sum of one set, for all columns or some."""
        return self._reduced(name, sums_of, quantile, columns)

    def gathered(self, prompts: PromptSet) -> Residuals:
        """Fetch all residuals of one set.

        Raises:
            SearchError: shards were lost again and again.
        """
        shards = []
        for shard_id in self._ids(prompts.name):
            for _ in range(ATTEMPTS):
                batch = self._pool.store.fetch(self._references[shard_id])
                if batch is not None:
                    shards.append(ResidualShard(batch))
                    break
                self._extract([shard_id])
            else:
                raise _lost([shard_id])
        return join(shards, prompts.fingerprint)

    def _reduced(
        self,
        name: str,
        function: Callable[Concatenate[RecordBatch, MoreArguments], Computed],
        *args: MoreArguments.args,
        **options: MoreArguments.kwargs,
    ) -> Computed:
        """Return the sum of `function` over one set's shards, each computed where the shard is."""
        total: Computed = self._added(name, function, None, *args, **options)
        return total

    def _added(
        self,
        name: str,
        function: Callable[Concatenate[RecordBatch, MoreArguments], Computed],
        start: Any,
        *args: MoreArguments.args,
        **options: MoreArguments.kwargs,
    ) -> Any:
        """Add `function` of each shard to `start`, in the order of the shards.

        A result is added, and dropped, as soon as all before it have come: the sum has the same
        bits on any number of replicas.

        Raises:
            SearchError: shards were lost again and again.
        """
        pending, early, total = self._ids(name), dict[ShardId, Computed](), start
        for _ in range(ATTEMPTS):
            missing = {own: self._references[own] for own in pending if own not in early}
            for own, part in self._pool.store.each(function, missing, *args, **options):
                if part is not None:
                    early[own] = part
                while pending and pending[0] in early:
                    following = early.pop(pending.pop(0))
                    total = following if total is None else add(total, following)
            if not pending:
                return total
            lost = [own for own in pending if own not in early]
            self._extract(lost)
        raise _lost(lost)

    def _extract(self, shard_ids: list[ShardId], done: Callable[[], None] = lambda: None) -> None:
        """Have the replicas extract shards, and store each as it comes."""
        calls = [self._calls[own] for own in shard_ids]
        extracted = self._pool.map_by_reference(ReplicaApi.extract_residuals, calls)
        for index, reference in extracted:
            name, number = shard_ids[index]
            self._references[name, number] = reference
            self._extracted.add((name, number))
            batch = self._pool.store.fetch(reference) if self._files.stores else None
            if batch is not None:
                self._files.store(ResidualShard(batch), number, self._keys[name])
            done()

    def _ids(self, name: str) -> list[ShardId]:
        return [own for own in self._calls if own[0] == name]


def _lost(shard_ids: Iterable[ShardId]) -> SearchError:
    return SearchError(
        f"residuals were lost {ATTEMPTS} times, with the machines that held them: "
        f"{list(shard_ids)}.\n  Resume the run once the cluster is stable."
    )
