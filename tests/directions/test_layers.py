"""Shards of a run, reduced to what a method needs, one layer at a time; without Ray.

The pool here is this process: it hands out real shards, and its store works on them directly.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import numpy
import pytest
import torch

from ray_abliterate import __version__
from ray_abliterate.cluster.object_store import Reference
from ray_abliterate.cluster.residual_shards import ExtractionSettings, ResidualShards
from ray_abliterate.data.prompts import PromptSet
from ray_abliterate.directions.compute import directions_from_residuals
from ray_abliterate.directions.directions import Directions, NoDirection
from ray_abliterate.directions.residuals.moments import rows_of
from ray_abliterate.directions.residuals.residual_set import Residuals
from ray_abliterate.directions.residuals.shard import ResidualShard, content_key
from ray_abliterate.directions.residuals.shard_files import ShardFiles
from ray_abliterate.errors import SearchError
from ray_abliterate.model.batch_size import Tuning
from ray_abliterate.pipeline.progress import SilentProgress
from ray_abliterate.recipe import DirectionSettings
from ray_abliterate.replica.messages import ModelFacts, ReplicaApi
from ray_abliterate.search.plan import ModelShape
from ray_abliterate.testing.directions import assert_same_directions, planted_residuals

ROWS = 4
LAYERS = 3


@dataclass
class Store:
    """References hold the values; parts come back in reverse order, and some are lost at first."""

    lose: int = 0
    backwards: bool = True
    parts: list[Any] = field(default_factory=list)

    def put(self, value: Any) -> Reference[Any]:
        return Reference(value)

    def fetch(self, reference: Reference[Any]) -> Any:
        return reference.handle

    def each(self, function: Any, references: Any, *args: Any) -> Iterator[tuple[Any, Any]]:
        items = list(references.items())
        for key, value in reversed(items) if self.backwards else items:
            if self.lose > 0:
                self.lose -= 1
                yield key, None
                continue
            part = function(value.handle, *args)
            self.parts.append((function.__name__, *args[:1]))
            yield key, part


class Pool:
    """Makes the shards of two sets of residuals."""

    def __init__(
        self,
        sets: dict[str, Residuals],
        store: Store,
        layers: int,
        components: tuple[str, ...] = (),
    ) -> None:
        self.sets, self.store, self.calls = sets, store, 0
        hidden = sets["behaviour"].values.shape[2]
        self.facts = ModelFacts(
            ModelShape(layers, hidden, components or ("mlp",)),
            2,
            10,
            40,
            10,
            "float32",
            "cpu",
            "llama",
            "r1",
        )

    def map_by_reference(self, method: Any, calls: Any) -> Iterator[tuple[int, Any]]:
        for index, (name, first, prompts, *_) in enumerate(calls):
            assert method is ReplicaApi.extract_residuals
            self.calls += 1
            values = self.sets[name].values[first : first + len(prompts)].numpy()
            yield index, Reference(ResidualShard.of(name, first, values).batch)


def opened(
    prompts: int, hidden: int, lose: int = 0, positions: int = 1
) -> tuple[ResidualShards, Pool, list[Residuals]]:
    """Of several positions, the sets differ most at the one before the last."""
    layers = LAYERS * positions
    *sets, planted = planted_residuals(seed=2, prompts=prompts, layers=layers, hidden=hidden)
    if positions > 1:
        weaker = sets[0].values.clone()
        weaker[:, :LAYERS] -= 4 * planted
        weaker[:, 2 * LAYERS :] -= 5 * planted
        sets[0] = Residuals(weaker)
    both = [Residuals(s.values[:prompts], name) for s, name in zip(sets, "bn", strict=True)]
    shards, pool = of_sets(both, positions=positions)
    pool.store.lose = lose
    return shards, pool, both


def of_sets(
    sets: Sequence[Residuals],
    texts: Sequence[Sequence[str]] | None = None,
    positions: int = 1,
    components: tuple[str, ...] = (),
) -> tuple[ResidualShards, Pool]:
    """Shards of two sets, extracted; of prompts that are all different, if there are no texts."""
    layers = sets[0].layers // positions // (1 + len(components))
    pool = Pool(dict(zip(("behaviour", "neutral"), sets, strict=True)), Store(), layers, components)
    if texts is None:
        texts = [[f"{name} {i}" for i in range(len(s.values))] for name, s in pool.sets.items()]
    prompts = [PromptSet.of(name, *own) for name, own in zip(pool.sets, texts, strict=True)]
    tuning = Tuning(read_rows=ROWS, answer_rows=2, state_every=1, drafts=False)
    files = ShardFiles(None, None, pytest.fail)
    extraction = ExtractionSettings(ROWS, (), "float32", tuning, positions, bool(components))
    shards = ResidualShards(pool, files, extraction, *prompts)
    shards.extract(SilentProgress().step)
    return shards, pool


READS = {
    "mean-difference": "sums_of",
    "variance-scaled": "moments_of",
    "whitened": "rows_of",
    "svd-subspace": "rows_of",
    "median-difference": "rows_of",
    "logistic-probe": "rows_of",
    "tests.support.own_methods:trimmed_difference": "rows_of",
}


@pytest.mark.parametrize("method", sorted(READS))
@pytest.mark.parametrize(("prompts", "hidden"), [(18, 8), (10, 40)])
@pytest.mark.parametrize("quantile", [1.0, 0.9])
def test_directions_are_those_of_whole_sets_and_no_more_is_read_at_a_time(
    method: str, prompts: int, hidden: int, quantile: float
) -> None:
    shards, pool, both = opened(prompts, hidden)
    settings = DirectionSettings(method=method, winsorize_quantile=quantile)
    assert_same_directions(
        shards.directions(settings), directions_from_residuals(*both, settings), 1e-6
    )
    name = READS[method]
    assert {part[0] for part in pool.store.parts} == {name}
    if name == "rows_of":  # a layer of both sets after the other
        of_layers = [part[1] for part in pool.store.parts]
        assert of_layers == sorted(of_layers)
        assert set(of_layers) == set(range(LAYERS))


def test_where_second_moments_are_computed_is_reported() -> None:
    whitened = DirectionSettings(method="whitened")
    many = opened(18, 8)[0].directions(whitened).origin["statistics"]
    few = opened(10, 40)[0].directions(whitened).origin["statistics"]
    assert "as covariances of 8 units (36 prompts are no fewer)" in many
    assert "in the span of the residuals (20 prompts are fewer than 40 units)" in few
    probe = opened(10, 8)[0].directions(DirectionSettings(method="inlp"))
    assert probe.origin["statistics"] == "layer by layer from all residuals"
    assert "statistics" not in opened(10, 8)[0].directions(DirectionSettings()).origin


@pytest.mark.parametrize("method", ["mean-difference", "whitened", "median-difference"])
def test_parts_that_are_lost_are_made_again_and_change_no_bit(method: str) -> None:
    settings = DirectionSettings(method=method)
    expected = opened(18, 8)[0].directions(settings).vectors
    shards, pool, _ = opened(18, 8, lose=3)
    before = pool.calls
    assert torch.equal(shards.directions(settings).vectors, expected)
    assert pool.calls == before + 3
    with pytest.raises(SearchError, match=r"lost 3 times.*behaviour"):
        opened(18, 8, lose=100)[0].directions(settings)


def test_parts_are_added_in_the_order_of_the_shards_in_whatever_order_they_come() -> None:
    totals, rows = [], []
    for backwards in (True, False):
        shards, pool, both = opened(50, 8)
        pool.store.backwards = backwards
        totals.append(shards.sums("behaviour", 0.9).totals.tobytes())
        rows.append(shards._reduced("neutral", rows_of, 1).values)
    assert totals[0] == totals[1]
    for found in rows:
        assert numpy.array_equal(found, both[1].values[:, 1].numpy())


@pytest.mark.parametrize("method", ["mean-difference", "variance-scaled", "whitened", "inlp"])
def test_of_several_token_positions_the_one_that_separates_best_is_taken(method: str) -> None:
    shards, _, both = opened(30, 8, positions=3)
    settings = DirectionSettings(method=method, positions=3, biproject=True)
    found = shards.directions(settings)
    assert found.layers == LAYERS
    assert found.origin["position"] == "-2"
    own = [Residuals(s.values[:, LAYERS : 2 * LAYERS].contiguous()) for s in both]
    expected = directions_from_residuals(*own, settings)
    assert_same_directions(found, expected, 1e-6)
    assert found.spared is not None and expected.spared is not None
    torch.testing.assert_close(found.spared, expected.spared)
    alone, _ = of_sets(own)
    again = alone.directions(settings.model_copy(update={"positions": 1}))
    rows = shards.separation(found, settings)
    for row, other in zip(rows, alone.separation(again, settings), strict=True):
        assert row == pytest.approx(other, rel=1e-5, abs=1e-7)
    assert [row["layer"] for row in rows] == list(range(LAYERS))


def test_directions_survive_the_choice_of_a_position() -> None:
    found = opened(30, 8, positions=3)[0].directions(DirectionSettings(positions=3))
    again = Directions.from_bytes(found.to_bytes())
    assert torch.equal(again.vectors, found.vectors) and again.origin == found.origin


PARTS = ("attn", "mlp")


def of_components(differ: dict[tuple[int, int], int], positions: int = 2) -> list[Residuals]:
    """Two sets of noise that differ in a unit, by position and part (0 is the stream)."""
    random = torch.Generator().manual_seed(4)
    shape = 20, positions, 1 + len(PARTS), LAYERS, 24
    one, other = (torch.randn(shape, generator=random) for _ in "bn")
    for (place, part), unit in differ.items():
        one[:, place, part, :, unit] += 9.0
    return [Residuals(values.flatten(1, 3)) for values in (one, other)]


@pytest.mark.parametrize("method", ["mean-difference", "variance-scaled", "geometric-median"])
def test_components_have_their_directions_at_the_position_that_was_chosen_for_the_stream(
    method: str,
) -> None:
    sets = of_components({(1, 0): 3, (1, 1): 5, (1, 2): 7, (0, 1): 11})
    settings = DirectionSettings(method=method, positions=2, per_component=True)
    shards, _ = of_sets(sets, positions=2, components=PARTS)
    found = shards.directions(settings)
    assert found.origin["position"] == "-2" and set(found.components) == set(PARTS)
    for name, part, unit in (("", 0, 3), ("attn", 1, 5), ("mlp", 2, 7)):
        columns = slice(LAYERS * (3 + part), LAYERS * (4 + part))
        own = [Residuals(s.values[:, columns].contiguous()) for s in sets]
        expected = directions_from_residuals(*own, settings)
        directions = found.for_component(name) if name else found
        assert_same_directions(directions, expected, 1e-6)
        assert directions.vectors[:, unit].abs().min() > 0.6
    rows = shards.separation(found, settings)
    assert len(rows) == LAYERS and min(row["auroc"] for row in rows) > 0.99


def test_a_position_where_the_sets_are_the_same_is_not_taken_and_nowhere_is_an_error() -> None:
    sets = of_components({(1, 0): 3})
    for place in (0, 1):
        first = slice(place * 3 * LAYERS, (place * 3 + 1) * LAYERS)
        sets[1].values[:, first] = sets[0].values[:, first]
        if place == 0:
            found = of_sets(sets, positions=2, components=PARTS)[0]
            settings = DirectionSettings(positions=2, per_component=True)
            assert found.directions(settings).origin["position"] == "-2"
    with pytest.raises(NoDirection, match="leave the same residuals"):
        of_sets(sets, positions=2, components=PARTS)[0].directions(settings)


def test_a_component_that_adds_the_same_everywhere_is_edited_with_the_streams_directions(
    caplog: pytest.LogCaptureFixture,
) -> None:
    sets = of_components({(0, 0): 3, (0, 1): 5}, positions=1)
    sets[1].values[:, 2 * LAYERS :] = sets[0].values[:, 2 * LAYERS :]
    settings = DirectionSettings(per_component=True)
    found = of_sets(sets, components=PARTS)[0].directions(settings)
    assert set(found.components) == {"attn"} and found.for_component("mlp") is found
    assert "what mlp adds to the stream is the same" in caplog.text


def test_residuals_at_one_position_keep_the_key_that_they_had() -> None:
    facts = opened(10, 8)[1].facts
    tuning = Tuning(read_rows=ROWS, answer_rows=2, state_every=1, drafts=False)
    prompts = PromptSet.of("behaviour", "a", "b")
    keys = [
        ExtractionSettings(ROWS, (), "float32", tuning, k).key(facts, prompts) for k in (1, 2, 3)
    ]
    assert len(set(keys)) == 3
    assert keys[0] == ExtractionSettings(ROWS, (), "float32", tuning).key(facts, prompts)
    versions = [__version__, version("torch"), version("transformers")]
    assert keys[0] == content_key(
        weights=facts.fingerprint, revision="r1", model_dtype="float32", computes=facts.computes,
        template=facts.template, set="behaviour", prompts=prompts.fingerprint,
        response_prefix=(), rows=ROWS, dtype="float32", versions=versions,
    )  # fmt: skip


@pytest.mark.parametrize("quantile", [1.0, 0.9])
def test_layers_are_read_one_at_a_time(quantile: float) -> None:
    shards, pool, both = opened(10, 8)
    whole = [s.winsorized(quantile).values for s in both]
    for index, layer in enumerate(shards._layers(quantile, False, range(LAYERS))):
        assert torch.equal(layer.behaviour.values, whole[0][:, index])
        assert torch.equal(layer.neutral.values, whole[1][:, index])
        assert {part[1] for part in pool.store.parts} == set(range(index + 1))


def test_rows_become_a_covariance_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not all of them are there at once: it is what makes memory independent of prompts."""
    from ray_abliterate.directions.residuals import moments

    waiting = []
    plain = moments.PairedMoments.__add__

    def watched(self: Any, part: Any) -> Any:
        total = plain(self, part)
        waiting.append(sum(map(len, total.waiting.parts)))
        return total

    monkeypatch.setattr(moments, "ROWS_AT_ONCE", 8)
    monkeypatch.setattr(moments.PairedMoments, "__add__", watched)
    shards, _, both = opened(50, 8)
    settings = DirectionSettings(method="whitened")
    assert_same_directions(
        shards.directions(settings), directions_from_residuals(*both, settings), 1e-6
    )
    assert max(waiting) < 8
