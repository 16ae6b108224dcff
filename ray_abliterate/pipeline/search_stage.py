"""The search as a stage of a run: tries plans on the replicas, and records what comes of them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ray_abliterate.cluster.metrics import SearchMetrics
from ray_abliterate.cluster.object_store import Reference
from ray_abliterate.cluster.tune_search import TuneSearch
from ray_abliterate.errors import ModelError
from ray_abliterate.pipeline.directory import Baseline
from ray_abliterate.pipeline.initial_points import initial_points
from ray_abliterate.pipeline.run_context import RunContext
from ray_abliterate.replica.messages import ReplicaApi, TrialSetup
from ray_abliterate.search.frontier import Frontier, Trial
from ray_abliterate.search.space import SearchSpace


def search(
    context: RunContext,
    shared_setup: Reference[TrialSetup],
    baseline: Baseline,
    on_frontier: Callable[[Frontier], None] = lambda frontier: None,
) -> None:
    """Try plans until the run has as many trials as the recipe wants.

    Args:
        context: The run.
        shared_setup: Reference to the setup in the object store.
        baseline: Scores of the unedited model; where the search begins, and the reference point
            of the hypervolume.
        on_frontier: Called with the frontier after each trial.

    Raises:
        ModelError: the recipe asks for more trials per pass than the model allows.
    """
    recipe, directory, pool = context.recipe, context.directory, context.pool
    per_pass = resolve_trials_per_pass(context)
    if per_pass > 1:
        context.progress.note(f"{per_pass} trials share each pass")
    space = SearchSpace.of(pool.facts.shape, recipe.search.space, recipe.edit.norm)
    goals = [(scorer.name, scorer.goal) for scorer in recipe.scorers if scorer.goal != "report"]
    submit = context.record.writer.submit
    study = TuneSearch(directory.journal, space, recipe.search, goals, submit, per_pass)
    # The journal is ahead of trials.jsonl where a run was killed between the two writes.
    listed = {trial.number: trial for trial in directory.trials()}
    for trial in study.finished:
        known = listed.get(trial.number)
        if known != trial and not (trial.shared and known is not None):
            directory.append_trial(trial)
    done = {trial.number: trial for trial in directory.trials()}
    metrics, reference = SearchMetrics(), [loss or 1.0 for loss in baseline.scorecard.losses]

    def on_trial(trial: Trial, answers: tuple[dict[str, Any], ...]) -> None:
        done[trial.number] = trial
        context.record.record_trial(trial, answers)
        frontier = Frontier.of(done.values())
        metrics.frontier(frontier.hypervolume(reference))
        context.progress.trial(trial, len(done), recipe.search.trials, frontier)
        on_frontier(frontier)

    points = () if study.finished else initial_points(context, space, baseline)
    with context.progress.stage("search"):
        study.run(pool, shared_setup, points, on_trial, directory.tune, context.record.notify)
        context.record.writer.flush()
    rescore_frontier(context, shared_setup)


def resolve_trials_per_pass(context: RunContext) -> int:
    """Return how many trials share a pass: as the recipe says, or as measured when the run began.

    Raises:
        ModelError: the recipe asks for more than can.
    """
    wanted = context.recipe.search.trials_per_pass
    facts = context.pool.facts
    most = facts.most_per_pass
    if wanted == "auto":
        tuning = context.directory.tuning()
        return min(tuning.trials_per_pass, most) if tuning is not None else 1
    if wanted > most:
        raise ModelError(
            f"search.trials_per_pass = {wanted} is more than the {most} that can share a pass: "
            f"{facts.why_not_more}.\n  Set search.trials_per_pass = {most} or less."
        )
    return wanted


def rescore_frontier(context: RunContext, shared_setup: Reference[TrialSetup]) -> None:
    """Score members of the frontier with edited weights, if they shared their passes with others.

    Virtual edits round differently in half precision, so a member may leave the frontier, and
    others take its place; the loop ends when all members have been scored alone.
    """
    directory, pool = context.directory, context.pool
    if pool.facts.dtype == "float32":
        return
    while members := [t for t in Frontier.of(directory.trials()).members if t.shared]:
        with context.progress.stage("frontier, one by one"):
            for count, trial in enumerate(members, start=1):
                evaluation = pool.call(ReplicaApi.evaluate, trial.plan, shared_setup.argument)
                directory.append_trial(replace(trial, scorecard=evaluation.scorecard, shared=False))
                context.progress.step(count, len(members))
