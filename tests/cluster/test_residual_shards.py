"""Shards in the object store: the same bits whoever made them, found again, never used damaged."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from ray_abliterate.cluster.object_store import ObjectStore
from ray_abliterate.cluster.pool import ReplicaPool
from ray_abliterate.cluster.residual_shards import ExtractionSettings, ResidualShards
from ray_abliterate.data.prompts import PromptSet
from ray_abliterate.directions.compute import directions_from_residuals
from ray_abliterate.directions.residuals.residual_set import Residuals
from ray_abliterate.directions.residuals.shard_files import ShardFiles, ShardFolder
from ray_abliterate.errors import ScoreError, SearchError
from ray_abliterate.model.batch_size import Tuning
from ray_abliterate.pipeline.directory import RunDirectory
from ray_abliterate.pipeline.progress import SilentProgress
from ray_abliterate.pipeline.run import run
from ray_abliterate.recipe import Recipe
from ray_abliterate.replica.messages import ModelFacts, ReplicaApi, TrialSetup
from ray_abliterate.search.plan import ModelShape, Plan
from tests.conftest import RECIPE
from tests.support.stand_in_replicas import SHAPE, StandInReplica, begin_by_reference, pool_of

pytestmark = pytest.mark.ray

TUNING = Tuning(read_rows=2, answer_rows=2, state_every=1, drafts=False)


def changed(recipe: Recipe, section: str, **values: Any) -> Recipe:
    part = getattr(recipe, section).model_copy(update=values)
    return recipe.model_copy(update={section: part})


def median_difference(behaviour: Residuals, neutral: Residuals) -> torch.Tensor:
    """A method of the user's own, which wants whole sets."""
    return behaviour.values.double().median(0).values - neutral.values.double().median(0).values


@pytest.fixture(scope="module")
def pool(planted: Path, behaviour: PromptSet, neutral: PromptSet) -> Iterator[ReplicaPool]:
    """A real replica of the planted model, for all tests here."""
    folder = planted.parent
    for prompts in (behaviour, neutral):
        text = "\n".join(prompt.user for prompt in prompts.prompts)
        (folder / f"{prompts.name}.txt").write_text(text)
    recipe = Recipe.parse(RECIPE.format(model=planted, replicas=1, trials=6), "recipe.toml")
    with ReplicaPool.start(recipe, str(planted), scored(behaviour, neutral)) as started:
        yield started


def scored(behaviour: PromptSet, neutral: PromptSet) -> dict[str, PromptSet]:
    return {"keyword-rate": behaviour, "kl-divergence": neutral}


Open = Callable[..., ResidualShards]


@pytest.fixture
def opened(recipe: Recipe, behaviour: PromptSet, neutral: PromptSet) -> Open:
    """Shards of two prompts each, extracted."""

    def opened(
        pool: ReplicaPool, own: Path | None = None, dtype: str = "float32"
    ) -> ResidualShards:
        files = ShardFiles(ShardFolder(own) if own else None, None, pytest.fail)
        extraction = ExtractionSettings(2, (), dtype, TUNING)
        shards = ResidualShards(pool, files, extraction, behaviour, neutral)
        shards.extract(SilentProgress().step)
        return shards

    return opened


def test_directions_separation_and_scores_have_the_same_bits_on_any_number_of_replicas(
    recipe: Recipe, planted: Path, opened: Open, tmp_path: Path,
    behaviour: PromptSet, neutral: PromptSet,
) -> None:  # fmt: skip
    quantiles = (1.0, 0.9)
    settings = [
        recipe.direction.model_copy(update={"winsorize_quantile": quantile})
        for quantile in quantiles
    ]
    plan = Plan.uniform(ModelShape(4, 32, ("attn", "mlp")), 2.6, "row", 0.9)
    found: list[tuple[Any, ...]] = []
    cards = []
    for count in (1, 2, 3):
        several = changed(recipe, "model", replicas=count)
        with ReplicaPool.start(several, str(planted), scored(behaviour, neutral)) as pool:
            for _ in ("made", "from disk"):
                shards = opened(pool, tmp_path / str(count))
                directions = [shards.directions(each) for each in settings]
                rows = [shards.separation(*each) for each in zip(directions, settings, strict=True)]
                found.append((directions, rows))
                facts = shards.facts()
            assert [facts[name]["reused"] for name in ("behaviour", "neutral")] == [4, 4]
            whole = [shards.gathered(s) for s in (behaviour, neutral)]
            setup = pool.put(TrialSetup(directions[0]))
            cards += [
                pool.call(ReplicaApi.evaluate, plan, setup.argument).scorecard for _ in range(count)
            ]
    for directions, separation in found[1:]:
        for mine, first in zip(directions, found[0][0], strict=True):
            assert torch.equal(mine.vectors, first.vectors)
        assert separation == found[0][1]
    assert len(cards) == 6 and all(card == cards[0] for card in cards)
    for directions, each in zip(found[0][0], settings, strict=True):
        direct = directions_from_residuals(*whole, each)
        torch.testing.assert_close(directions.vectors, direct.vectors, rtol=2**-23, atol=1e-12)
        assert directions.origin == direct.origin


def test_the_driver_fetches_no_shard_that_it_does_not_write(
    pool: ReplicaPool, recipe: Recipe, opened: Open, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fetched: list[Any] = []
    fetch = ObjectStore.fetch

    def counted(self: ObjectStore, reference: Any) -> Any:
        value = fetch(self, reference)
        fetched.append(type(value).__name__)
        return value

    monkeypatch.setattr(ObjectStore, "fetch", counted)
    shards = opened(pool)
    shards.separation(shards.directions(recipe.direction), recipe.direction)
    assert set(fetched) == {"Sums", "ByFold", "ResidualRows"} and len(fetched) == 32
    fetched.clear()
    opened(pool, tmp_path / "stored")
    assert fetched == ["RecordBatch"] * 8


def test_float16_shards_take_half_the_space_and_give_nearly_the_same_directions(
    pool: ReplicaPool, recipe: Recipe, planted: Path, opened: Open, tmp_path: Path
) -> None:
    half = changed(recipe, "direction", residual_dtype="float16")
    found = {}
    with ReplicaPool.start(half, str(planted), {}) as another:
        for dtype, own in (("float32", pool), ("float16", another)):
            shards = opened(own, tmp_path / dtype, dtype)
            found[dtype] = shards.directions(recipe.direction).vectors
    types = {
        dtype: next(ShardFolder(tmp_path / dtype).read_all("neutral")).layer(0).dtype.name
        for dtype in found
    }
    assert types == {"float32": "float32", "float16": "float16"}
    usable = found["float32"].any(dim=-1)
    assert usable.tolist() == [False, False, True, True]
    assert not torch.equal(found["float32"], found["float16"])
    cosines = torch.cosine_similarity(found["float32"], found["float16"])
    assert cosines[usable].min() > 1 - 1e-5


def test_a_method_of_ones_own_gets_whole_sets(
    pool: ReplicaPool, recipe: Recipe, opened: Open, behaviour: PromptSet, neutral: PromptSet
) -> None:
    own = recipe.direction.model_copy(update={"method": f"{__name__}:median_difference"})
    shards = opened(pool)
    found = shards.directions(own)
    whole = [shards.gathered(s) for s in (behaviour, neutral)]
    assert [len(s.values) for s in whole] == [7, 7]
    assert torch.equal(found.vectors, directions_from_residuals(*whole, own).vectors)


class Forgetful(ObjectStore):
    """Has lost what is behind some references."""

    def __init__(self) -> None:
        self.lost: list[Any] = []

    def fetch(self, reference: Any) -> Any:
        return None if reference in self.lost else super().fetch(reference)

    def each(self, function: Any, references: Any, *args: Any) -> Iterator[tuple[Any, Any]]:
        for place, value in super().each(function, references, *args):
            yield place, None if references[place] in self.lost else value


def test_shards_that_are_lost_are_extracted_again_and_no_others(
    pool: ReplicaPool, recipe: Recipe, opened: Open, behaviour: PromptSet, calls: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    store = Forgetful()
    monkeypatch.setattr(pool, "store", store)
    shards = opened(pool)
    before = shards.directions(recipe.direction)
    whole = shards.gathered(behaviour)
    for found in (
        lambda: shards.directions(recipe.direction).vectors.equal(before.vectors),
        lambda: shards.gathered(behaviour).values.equal(whole.values),
    ):
        store.lost = [shards._references["behaviour", number] for number in (1, 3)]
        calls.clear()
        assert found()
        assert calls == [ReplicaApi.extract_residuals] * 2


def test_shards_that_are_lost_again_and_again_are_an_error(
    pool: ReplicaPool, recipe: Recipe, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = opened(pool)
    monkeypatch.setattr(ObjectStore, "fetch", lambda *_: None)
    with pytest.raises(SearchError, match=r"lost 3 times.*behaviour"):
        shards.directions(recipe.direction)


NODE_GOES = """
import sys, ray
from ray.cluster_utils import Cluster
from ray_abliterate.cluster.object_store import ObjectStore
from tests.support.stand_in_replicas import OPEN, StandInReplica, pool_of

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
ray.init(address=cluster.address, log_to_driver=False)  # before there is a node to choose from
other = cluster.add_node(num_cpus=1, num_gpus=1)
pool, store = pool_of(sys.argv[1], 1, gpus_per_replica=1), ObjectStore()
values = dict(pool.map_by_reference(StandInReplica.large, [(n,) for n in range(3)]))
nodes = dict(store.each(lambda _: ray.get_runtime_context().get_node_id(), values))
assert set(nodes.values()) == {other.node_id}, "a task did not run where its value lies"
here = store.put(b"here")
cluster.remove_node(other)
assert dict(store.each(len, {**values, "here": here})) == {**dict.fromkeys(values), "here": 4}
assert store.fetch(values[0]) is None
OPEN.close()
ray.shutdown()
cluster.shutdown()
"""


def test_tasks_run_where_values_lie_and_values_that_go_with_a_machine_are_known_to_be_lost(
    tmp_path: Path,
) -> None:
    with tempfile.TemporaryDirectory(prefix="ray") as own:  # short: sockets lie under it
        done = subprocess.run(
            [sys.executable, "-c", NODE_GOES, str(tmp_path)], capture_output=True, text=True,
            timeout=200, env={
                **os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "RAY_TMPDIR": own
            },
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_error_over_a_value_is_raised_as_it_is() -> None:
    store = ObjectStore()
    with pytest.raises(TypeError):
        dict(store.each(abs, {"a": store.put("text")}))


# The pool


def test_a_result_by_reference_stays_where_it_is_and_outlives_its_replica(tmp_path: Path) -> None:
    pool = pool_of(tmp_path, 1)
    large = b"x" * 1_000_000
    (reference,) = ray.get(begin_by_reference(pool, StandInReplica.echo, large))
    assert isinstance(reference, ray.ObjectRef)
    with pytest.raises(SearchError, match="two replicas died"):
        pool.call(StandInReplica.die)
    assert ray.get(reference) == (large,)


def test_a_call_by_reference_fails_and_moves_as_any_other(tmp_path: Path) -> None:
    pool = pool_of(tmp_path, 2)
    with pytest.raises(ScoreError, match="the score is broken"):
        list(pool.map_by_reference(StandInReplica.fail, [()]))
    with pytest.raises(SearchError, match="two replicas died"):
        list(pool.map_by_reference(StandInReplica.die, [()]))
    (tmp_path / "die-once").touch()
    plan = Plan.uniform(SHAPE, 3.0, "none")
    calls = [(plan, None, None)]
    ((_, reference),) = pool.map_by_reference(StandInReplica.evaluate, calls)
    assert pool.store.fetch(reference).scorecard["rate"].value == 1.0


# Runs


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAY_ABLITERATE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "residuals"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Methods that were called by reference."""
    asked: list[Any] = []
    original = ReplicaPool.map_by_reference

    def counted(self: ReplicaPool, method: Any, calls: Any) -> Any:
        asked.extend([method] * len(calls))
        return original(self, method, calls)

    monkeypatch.setattr(ReplicaPool, "map_by_reference", counted)
    return asked


@pytest.fixture
def finished(
    pool: ReplicaPool, recipe: Recipe, recipe_file: Path, tmp_path: Path, cache: Path,
    calls: list[Any], monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., RunDirectory]:  # fmt: skip
    """Runs the recipe with other settings, on the replica that is there; counts its calls only."""
    start = ReplicaPool.start

    def found_or_started(wanted: Recipe, *rest: Any) -> Any:
        """Replicas keep the recipe's batch size."""
        same = wanted.run.batch_size == recipe.run.batch_size
        return nullcontext(pool) if same else start(wanted, *rest)

    monkeypatch.setattr(ReplicaPool, "start", found_or_started)

    def finished(name: str, section: str = "search", **values: Any) -> RunDirectory:
        wanted = changed(changed(recipe, "run", residual_cache=True), "search", trials=1)
        wanted = changed(wanted, section, **values)
        directory = RunDirectory(tmp_path / name)
        if not directory.path.exists():
            directory = RunDirectory.create(directory.path, wanted, recipe_file.read_text())
        calls.clear()
        run(wanted, directory, tmp_path)
        return directory

    return finished


def reused(directory: RunDirectory) -> list[tuple[int, int]]:
    facts = directory.read_environment()["residuals"]
    return [(facts[name]["reused"], facts[name]["shards"]) for name in ("behaviour", "neutral")]


def found(directory: RunDirectory) -> list[Any]:
    directions = directory.directions()
    assert directions is not None
    return [directions.vectors.tolist(), (directory.path / "baseline.json").read_bytes()]


def test_a_second_run_and_a_resumed_one_read_the_shards_of_the_first(
    finished: Callable[..., RunDirectory], calls: list[Any]
) -> None:
    first = finished("first")
    assert calls == [ReplicaApi.extract_residuals] * 6 and reused(first) == [(0, 3), (0, 3)]
    second = finished("second")
    assert calls == [] and reused(second) == [(3, 3), (3, 3)]
    assert found(second) == found(first)
    assert second.residuals("neutral") is not None
    # stopped between directions and baseline, and between residuals and directions
    for lost in (["baseline.json"], ["baseline.json", "directions.safetensors"]):
        for file in lost:
            (second.path / file).unlink()
        finished("second")
        assert calls == [] and reused(second) == [(3, 3), (3, 3)]
        assert found(second) == found(first)
    # stopped while residuals were extracted
    second.shards.file("neutral", 2).unlink()
    (second.path / "directions.safetensors").unlink()
    finished("second", "run", residual_cache=False)
    assert calls == [ReplicaApi.extract_residuals] and reused(second) == [(3, 3), (2, 3)]
    assert found(second) == found(first)


def test_winsorising_reads_the_same_shards_and_other_batches_are_others(
    finished: Callable[..., RunDirectory], calls: list[Any]
) -> None:
    first = finished("first")
    winsorized = finished("winsorized", "direction", winsorize_quantile=0.9)
    assert calls == [] and reused(winsorized) == [(3, 3), (3, 3)]
    assert found(winsorized)[0] != found(first)[0]
    other = finished("other", "run", batch_size=4, save_residuals=False)
    assert calls == [ReplicaApi.extract_residuals] * 4 and reused(other) == [(0, 2), (0, 2)]
    assert not other.shards.path.exists()


def test_a_damaged_shard_is_extracted_again_with_a_warning_in_the_report(
    finished: Callable[..., RunDirectory], cache: Path, calls: list[Any]
) -> None:
    first = finished("first")
    key = first.read_environment()["residuals"]["neutral"]["key"]
    file = cache / key / "neutral-00001.arrow"
    shard = ShardFolder(file.parent).read("neutral", 1, key)
    assert shard is not None
    data = bytearray(file.read_bytes())
    data[data.index(shard.layer(2)[0, :4].tobytes()) + 3] ^= 0x40
    file.unlink()
    file.write_bytes(data)
    second = finished("second")
    assert calls == [ReplicaApi.extract_residuals] and reused(second) == [(3, 3), (2, 3)]
    (warning,) = [text for text in second.read_environment()["warnings"] if "damaged" in text]
    assert str(file) in warning
    assert found(second) == found(first)
    assert file.read_bytes() == first.shards.file("neutral", 1).read_bytes()


FACTS = ModelFacts(
    ModelShape(2, 8, ("mlp",)), 2, 10, 40, 10, "float32", "cpu (1 threads)", "llama", "r1",
    fingerprint="f", template="t", computes="cpu",
)  # fmt: skip


def test_a_key_changes_with_all_that_decides_what_residuals_are_and_with_nothing_else() -> None:
    extraction, prompts = (
        ExtractionSettings(2, (5,), "float32", TUNING),
        PromptSet.of("neutral", "a", "b"),
    )
    key = extraction.key(FACTS, prompts)
    others = [
        extraction.key(replace(FACTS, **{name: "other"}), prompts)
        for name in ("fingerprint", "revision", "dtype", "template", "computes")
    ]
    others += [
        replace(extraction, **{name: value}).key(FACTS, prompts)
        for name, value in (("rows", 3), ("response_prefix", ()), ("dtype", "float16"))
    ]
    others += [
        extraction.key(FACTS, PromptSet.of("neutral", "a", "c")),
        extraction.key(FACTS, PromptSet.of("behaviour", "a", "b")),
    ]
    assert len({key, *others}) == 11
    same = replace(FACTS, device="cpu (2 threads)", cache_bytes=11, notes=("slow",))
    assert extraction.key(same, prompts) == key
    assert replace(extraction, tuning=replace(TUNING, drafts=True)).key(FACTS, prompts) == key


def test_batches_are_the_recipes_or_a_power_of_two_that_fits(recipe: Recipe) -> None:
    assert ExtractionSettings.of(recipe, (), replace(TUNING, read_rows=3)).rows == 3
    free_rows = changed(recipe, "run", batch_size=None)
    rows = [
        ExtractionSettings.of(free_rows, (), replace(TUNING, read_rows=n)).rows
        for n in (1, 127, 128)
    ]
    assert rows == [1, 64, 128]
