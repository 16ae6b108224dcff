"""The search's side of a run: plans are tried, and what comes of them is kept."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from ray_abliterate.cluster.events import describe, stamp
from ray_abliterate.cluster.metrics import SearchMetrics
from ray_abliterate.cluster.pool import ReplicaPool
from ray_abliterate.cluster.tune_search import Search
from ray_abliterate.errors import ModelError
from ray_abliterate.pipeline.background_writer import BackgroundWriter
from ray_abliterate.pipeline.directory import Baseline, RunDirectory
from ray_abliterate.pipeline.initial_points import seed_points
from ray_abliterate.pipeline.progress import Watch
from ray_abliterate.recipe import Recipe
from ray_abliterate.replica.messages import ModelFacts
from ray_abliterate.search.frontier import Frontier, Trial
from ray_abliterate.search.plan import Space


class Record:
    """Writes what comes of a run into its directory, in the background, and says what happens."""

    def __init__(self, directory: RunDirectory, watch: Watch) -> None:
        self._directory, self._watch = directory, watch
        self.writer = BackgroundWriter(self.tell)

    def event(self, event: Mapping[str, Any]) -> None:
        """Something happened to the replicas or the files."""
        text = describe(dict(event))
        if text:
            self._watch.note(text)
        self.writer.submit(partial(self._directory.append_event, event))

    def tell(self, event: str, **details: Any) -> None:
        """Something happened here, now."""
        self.event({"time": stamp(), "event": event, **details})

    def trial(self, trial: Trial, answers: tuple[dict[str, Any], ...]) -> None:
        """A trial ended."""
        self.writer.submit(partial(self._directory.append, trial))
        if answers:
            save = partial(self._directory.save_responses, trial.number, list(answers))
            self.writer.submit(save)


def warn(directory: RunDirectory, watch: Watch, text: str) -> None:
    """Say it now, and in the report."""
    watch.note(f"warning: {text}")
    known = directory.environment.get("warnings", [])
    if text not in known:
        directory.note(warnings=[*known, text])


def search(
    recipe: Recipe,
    directory: RunDirectory,
    pool: ReplicaPool,
    shared: Any,
    baseline: Baseline,
    record: Record,
    watch: Watch,
    on_frontier: Callable[[Frontier], None] = lambda frontier: None,
) -> None:
    """Try plans until the run has as many as the recipe wants."""
    together = trials_per_pass(recipe, directory, pool.facts)
    if together > 1:
        watch.note(f"{together} trials share each pass")
    space = Space.of(pool.facts.shape, recipe.search.space, recipe.edit.norm)
    goals = [(scorer.name, scorer.goal) for scorer in recipe.scorers if scorer.goal != "report"]
    study = Search(directory.journal, space, recipe.search, goals, record.writer.submit, together)
    listed = {trial.number: trial for trial in directory.trials()}
    for trial in study.finished:
        known = listed.get(trial.number)
        if known != trial and not (trial.shared and known is not None):
            directory.append(trial)
    done = {trial.number: trial for trial in directory.trials()}
    metrics, far = SearchMetrics(), [loss or 1.0 for loss in baseline.scorecard.losses]

    def on_trial(trial: Trial, answers: tuple[dict[str, Any], ...]) -> None:
        done[trial.number] = trial
        record.trial(trial, answers)
        frontier = Frontier.of(done.values())
        metrics.frontier(frontier.hypervolume(far))
        watch.trial(trial, len(done), recipe.search.trials, frontier)
        on_frontier(frontier)

    new = not study.finished
    say = partial(warn, directory, watch)
    seeds = seed_points(recipe, directory, space, baseline, say) if new else ()
    with watch.stage("search"):
        study.run(pool, shared, seeds, on_trial, directory.tune, record.tell)
        record.writer.flush()
    score_members_alone(directory, pool, shared, watch)


def trials_per_pass(recipe: Recipe, directory: RunDirectory, facts: ModelFacts) -> int:
    """Trials that share a pass in this run: as the recipe says, or as was chosen when it began.

    Raises:
        ModelError: the recipe asks for more than can.
    """
    given, most = recipe.search.trials_per_pass, facts.most_per_pass
    if given == "auto":
        tuning = directory.tuning()
        return min(tuning.trials_per_pass, most) if tuning is not None else 1
    if given > most:
        raise ModelError(
            f"search.trials_per_pass = {given} is more than the {most} that can share a pass: "
            f"{facts.why_not_more}.\n  Set search.trials_per_pass = {most} or less."
        )
    return given


def score_members_alone(
    directory: RunDirectory, pool: ReplicaPool, shared: Any, watch: Watch
) -> None:
    """Score what is on the frontier with edited weights, if it shared its passes with others.

    Virtual edits round differently in half precision, so that a member may leave the frontier, and
    others take its place: until all members are scored alone.
    """
    if pool.facts.dtype == "float32":
        return
    while members := [t for t in Frontier.of(directory.trials()).members if t.shared]:
        with watch.stage("frontier, one by one"):
            for count, trial in enumerate(members, start=1):
                evaluation = pool.evaluate(trial.plan, shared)
                directory.append(replace(trial, scorecard=evaluation.scorecard, shared=False))
                watch.step(count, len(members))
