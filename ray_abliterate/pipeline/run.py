"""The whole story: recipe → residuals → directions → baseline → search → frontier.

Everything is left in the run directory as it comes; a run that was stopped goes on from there.
"""

import logging
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ray_abliterate.cluster.connection import connect, ours
from ray_abliterate.cluster.pool import ReplicaPool
from ray_abliterate.cluster.residual_shards import Extraction, Shards
from ray_abliterate.data.prompt_sources import load_prompt_set, warn_on_overlap
from ray_abliterate.data.prompts import PromptSet
from ray_abliterate.directions import compute, layer_separation
from ray_abliterate.directions.residuals.shard_files import ShardFiles
from ray_abliterate.errors import ModelError, PromptSourceError
from ray_abliterate.model.source import model_source
from ray_abliterate.pipeline.directory import Baseline, RunDirectory
from ray_abliterate.pipeline.initial_points import probe_of, select_layer
from ray_abliterate.pipeline.progress import Unwatched, Watch
from ray_abliterate.pipeline.prompt_filter import Answering, agreeing, refuse_alike, refuse_small
from ray_abliterate.pipeline.search_stage import Record, search, warn
from ray_abliterate.pipeline.validation import validate, validating
from ray_abliterate.recipe import PluginScorer, Recipe
from ray_abliterate.replica.replica import Setup
from ray_abliterate.search.frontier import Frontier
from ray_abliterate.search.plan import Plan, Space
from ray_abliterate.search.score import resolve

log = logging.getLogger(__name__)

PREFIX_PROMPTS = 16
"""Prompts of each set whose answers are compared to find the response prefix."""
LIBRARIES = ("ray", "torch", "transformers", "optuna", "datasets", "safetensors", "pyarrow")


@dataclass(frozen=True)
class PromptSets:
    """All prompt sets of a run."""

    behaviour: PromptSet
    neutral: PromptSet
    scored: dict[str, PromptSet]
    """By the scorer's name."""

    def facts(self) -> dict[str, dict[str, Any]]:
        """Origin, size and fingerprint of each set."""
        named = {"behaviour": self.behaviour, "neutral": self.neutral, **self.scored}
        return {
            name: {"origin": s.origin, "prompts": len(s), "fingerprint": s.fingerprint}
            for name, s in named.items()
        }


def run(
    recipe: Recipe,
    directory: RunDirectory,
    base: Path,
    watch: Watch | None = None,
    profile: bool = False,
) -> Frontier:
    """Run a recipe, or go on with a run that was stopped.

    Args:
        recipe: What to do.
        directory: Where everything goes; holds this recipe.
        base: The recipe's folder, for relative paths.
        watch: Is told what happens.
        profile: First of all trials, one is profiled.
    """
    watch = watch or Unwatched()
    with ExitStack() as open_until_the_end:
        open_until_the_end.enter_context(directory.locked())
        record = Record(directory, watch)
        open_until_the_end.enter_context(record.writer)
        sets = load_prompts(recipe, directory, base, watch)
        starting = replicas(recipe, directory, base, sets.scored, record, watch)
        pool, source = open_until_the_end.enter_context(starting)
        setup, shards = find_directions(recipe, directory, pool, sets, watch)
        shared = pool.put(setup)
        baseline = measure_baseline(directory, pool, setup, shared, shards, watch)
        if not directory.trials():
            try_layers(recipe, directory, pool, sets, setup, shards, watch)
        if profile:
            profile_trial(recipe, directory, pool, shared, baseline, watch)
        beside = validating(directory, base, source, pool, shared, record, watch)
        with beside as on_frontier:
            search(recipe, directory, pool, shared, baseline, record, watch, on_frontier)
        if len(directory.trials()) >= recipe.search.trials:
            validate(directory, base, pool, shared, watch)
    return Frontier.of(directory.trials())


@contextmanager
def replicas(
    recipe: Recipe,
    directory: RunDirectory,
    base: Path,
    scored: Mapping[str, PromptSet],
    record: Record,
    watch: Watch,
) -> Iterator[tuple[ReplicaPool, str]]:
    """A run's replicas, as soon as one can be used, and the source of their model; to be closed."""
    with watch.stage("model"):
        source = model_source(recipe.model.name, partial(warn, directory, watch), not ours())
    with ExitStack() as open_until_the_end:
        with watch.stage("replicas"):
            dashboard = connect(recipe.run.dashboard, (str(base.resolve()),))
            starting = ReplicaPool.start(directory.pinned(recipe), source, scored, record.event)
            pool = open_until_the_end.enter_context(starting)
        describe(recipe, directory, pool, dashboard, watch)
        yield pool, source


def load_prompts(recipe: Recipe, directory: RunDirectory, base: Path, watch: Watch) -> PromptSets:
    """Read all prompt sets; on a resumed run, make sure that they are the same ones.

    Raises:
        PromptSourceError: a set cannot be read, or is not what the run began with.
    """
    for scorer in recipe.scorers:
        if isinstance(scorer, PluginScorer):
            resolve(scorer.kind)
    compute.refuse_unknown(recipe.direction)
    with watch.stage("prompts"):
        pairs = recipe.direction.pairs_prompts
        sets = PromptSets(
            load_prompt_set("behaviour", recipe.prompts.behaviour, base, pairs),
            load_prompt_set("neutral", recipe.prompts.neutral, base, pairs),
            {
                scorer.name: load_prompt_set(scorer.name, scorer.prompts, base)
                for scorer in recipe.scorers
                if scorer.prompts is not None
            },
        )
    refuse_small(recipe, (sets.behaviour, sets.neutral))
    alike = refuse_alike(recipe, sets.behaviour, sets.neutral)
    known = directory.environment.get("prompts")
    for name, facts in sets.facts().items():
        if known is not None and known[name]["fingerprint"] != facts["fingerprint"]:
            raise PromptSourceError(
                f"the prompts of {name!r} are not the ones the run began with "
                f"({facts['origin']}).\n  Put them back, or start a new run with --to."
            )
    if known is None:
        overlaps = warn_on_overlap([sets.behaviour, sets.neutral], list(sets.scored.values()))
        places = {"base": str(base.resolve()), "base_given": str(base)}
        directory.note(prompts=sets.facts(), warnings=[*alike, *overlaps], **places)
    return sets


def describe(
    recipe: Recipe, directory: RunDirectory, pool: ReplicaPool, dashboard: str, watch: Watch
) -> None:
    """Note versions, device, model and replicas in `environment.json`."""
    facts = pool.facts
    shape = asdict(facts.shape)
    model = {k: v for k, v in asdict(facts).items() if k != "shape"}
    known = directory.environment.get("model", {}).get("fingerprint", facts.fingerprint)
    if known != facts.fingerprint:
        raise ModelError(
            f"the weights of {recipe.model.name} are not the ones the run began with.\n"
            "  Put them back (or pin model.revision), or start a new run with --to."
        )
    directory.note(
        model={"name": recipe.model.name, **shape, **model},
        replicas=asdict(pool.layout),
        versions={"python": platform.python_version(), **_versions()},
        machine=f"{platform.system()} {platform.machine()}",
        started=directory.environment.get("started") or time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    )
    share = facts.cache_bytes / facts.model_bytes
    watch.note(
        f"{recipe.model.name}: {facts.parameters / 1e6:,.0f} M parameters in {facts.dtype} on "
        f"{facts.device}, {facts.shape.layers} layers, {facts.writers} writers "
        f"({', '.join(facts.shape.components)}); weight cache {share:.0%} of the model; "
        f"{pool.layout.replicas} replica{'s' if pool.layout.replicas > 1 else ''}"
    )
    for note in facts.notes:
        watch.note(note)
    if dashboard:
        watch.note(f"Ray dashboard: http://{dashboard.removeprefix('http://')}")


def find_directions(
    recipe: Recipe, directory: RunDirectory, pool: ReplicaPool, sets: PromptSets, watch: Watch
) -> tuple[Setup, Shards | None]:
    """The directions and the response prefix, taken up from the directory or found now."""
    known = directory.directions()
    if known is not None and directory.baseline() is not None:
        return Setup(
            known, tuple(directory.environment["response_prefix"]), directory.tuning()
        ), None
    tuning = directory.tuning()
    if tuning is None:
        with watch.stage("batch sizes"):
            tuning = pool.call("tune", pool.layout.replicas)
        directory.note(tuning=asdict(tuning))
    prefix = response_prefix(recipe, directory, pool, sets, watch)
    if recipe.prompts.filter_by_behaviour:
        answering = Answering(pool, recipe, directory, prefix, tuning)
        both, say = (sets.behaviour, sets.neutral), partial(warn, directory, watch)
        behaviour, neutral = agreeing(both, answering, recipe, directory, say, watch)
        sets = replace(sets, behaviour=behaviour, neutral=neutral)
    extraction = Extraction.of(recipe, prefix, tuning)
    files = ShardFiles.of(recipe.run, directory.shards, partial(warn, directory, watch))
    shards = Shards(pool, files, extraction, sets.behaviour, sets.neutral)
    with watch.stage("residuals"):
        shards.extract(watch)
    directory.note(residuals=shards.facts())
    with watch.stage("directions"):
        found = shards.directions(recipe.direction)
    if how := found.origin.get("statistics"):
        watch.note(f"directions: {recipe.direction.method}, {how}")
    if position := found.origin.get("position"):
        watch.note(f"directions: token {position} of the prompts tells the sets apart best")
    directory.save_directions(found)
    return Setup(found, prefix, tuning), shards


def response_prefix(
    recipe: Recipe, directory: RunDirectory, pool: ReplicaPool, sets: PromptSets, watch: Watch
) -> tuple[int, ...]:
    """What all answers begin with, taken up from the directory or found now."""
    known = directory.environment.get("response_prefix")
    if known is not None:
        return tuple(known)
    prefix: tuple[int, ...] = ()
    if recipe.direction.skip_common_prefix:
        with watch.stage("common response prefix"):
            prompts = [
                *sets.behaviour.prompts[:PREFIX_PROMPTS],
                *sets.neutral.prompts[:PREFIX_PROMPTS],
            ]
            prefix = tuple(pool.call("response_prefix", prompts))
    directory.note(response_prefix=list(prefix))
    return prefix


def measure_baseline(
    directory: RunDirectory,
    pool: ReplicaPool,
    setup: Setup,
    shared: Any,
    shards: Shards | None,
    watch: Watch,
) -> Baseline:
    """The base model's own scores, and how well each layer tells the sets apart."""
    known = directory.baseline()
    if known is not None or shards is None:
        assert known is not None
        return known
    with watch.stage("baseline"):
        evaluation = pool.evaluate(Plan.nothing(), shared)
    rows = shards.separation(setup.directions, directory.recipe.direction)
    baseline = Baseline(evaluation.scorecard, tuple(rows), layer_separation.best_layer(rows))
    directory.save_baseline(baseline)
    for score in evaluation.scorecard.scores:
        watch.note(
            f"base model: {score.name} {score.value:.4g} [{score.low:.3g}, {score.high:.3g}]"
        )
    return baseline


def try_layers(
    recipe: Recipe,
    directory: RunDirectory,
    pool: ReplicaPool,
    sets: PromptSets,
    setup: Setup,
    shards: Shards | None,
    watch: Watch,
) -> None:
    """What each layer's direction does, if the search is to begin with the best of them."""
    if recipe.search.seeds != "log-odds":
        return

    def rows() -> Sequence[Mapping[str, float]]:
        base = directory.baseline()
        if base is not None or shards is None:
            assert base is not None
            return base.separation
        return shards.separation(setup.directions, recipe.direction)

    probe = probe_of(recipe, sets.scored)
    select_layer(directory, pool, probe, setup, rows, watch)


def profile_trial(
    recipe: Recipe,
    directory: RunDirectory,
    pool: ReplicaPool,
    shared: Any,
    baseline: Baseline,
    watch: Watch,
) -> None:
    """Where the time of a trial goes: a table, and a trace in the run directory."""
    space = Space.of(pool.facts.shape, recipe.search.space, recipe.edit.norm)
    plan = space.plan(space.seeds(float(baseline.best_layer))[1])
    with watch.stage("profile"):
        found = pool.call("profile", plan, shared)
    directory.save_profile(found.table(), found.trace)
    for line in found.table().splitlines():
        watch.note(line)
    watch.note(f"trace: {directory.path / 'profile' / 'trial.json.gz'} (open in ui.perfetto.dev)")


def _versions() -> dict[str, str]:
    found = {}
    for library in ("ray-abliterate", *LIBRARIES):
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            found[library] = "not installed"
    return found
