"""The search: Ray Tune runs OptunaSearch trials over the replica pool.

Trials are thin: no GPU, no model. Each asks the pool to evaluate a plan. Tune reuses the trial
actors; equal shares of the head's own resource limit how many run at once, and keep them on the
node with the driver's files. Without that limit Tune starts and stops a process for nearly every
trial. Resuming reads the journal; Tune's own state is not used.
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune import PlacementGroupFactory, RunConfig, TuneConfig
from ray.tune.logger import TBXLoggerCallback

from ray_abliterate.cluster.actor_call import call_actor, start_actor_call
from ray_abliterate.cluster.connection import HEAD
from ray_abliterate.cluster.events import ReportEvent
from ray_abliterate.cluster.object_store import Reference
from ray_abliterate.cluster.pool import ReplicaPool
from ray_abliterate.cluster.pool_actor import PoolActor
from ray_abliterate.cluster.tune_searcher import Answers, OnTrial, OutcomeHandlers, TuneSearcher
from ray_abliterate.cluster.tune_trial import PlanTrial
from ray_abliterate.recipe import Goal, SearchSettings
from ray_abliterate.replica.messages import TrialSetup
from ray_abliterate.search.dominance import ThresholdSet
from ray_abliterate.search.journal import Submit, write_in_foreground
from ray_abliterate.search.plan import ParameterValue
from ray_abliterate.search.space import SearchSpace
from ray_abliterate.search.study import (
    STUDY_NAME,
    end_interrupted_trials,
    finished_trials,
    make_sampler,
    open_storage,
    open_study,
)

SHOWN_BY_TUNE = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SECURITY_TOKEN",
    "AWS_SESSION_TOKEN",
)
"""Tune copies these variables from the driver into its trials' runtime environment, which dashboard
and logs show. Trials have no use for them."""

MOST_DEATHS = 2
"""A trial is restarted that often. Tune learns of a process's death from its task and from its
actor; where it learns twice, it gives the trial up at once, whatever this number."""
GROWTH_SECONDS = 15.0
"""A search makes room for replicas so long after they joined: others may be on their way."""


class _RecoveryReporter(tune.Callback):  # type: ignore[misc]
    """Reports trials whose process died."""

    def __init__(self, report: ReportEvent) -> None:
        self._report = report

    def __getstate__(self) -> dict[str, Any]:
        """Return nothing: Tune pickles its callbacks to restore them."""
        return {}

    def on_trial_recover(self, **_: Any) -> None:
        """Report that Tune begins a trial again."""
        self._report("trial-process-lost")


class _TensorBoardLogger(TBXLoggerCallback):  # type: ignore[misc]
    """Writes Tune's files for TensorBoard while the disk takes them; nothing depends on them."""

    def log_trial_start(self, trial: Any) -> None:
        with suppress(OSError):
            super().log_trial_start(trial)

    def log_trial_result(self, iteration: int, trial: Any, result: dict[str, Any]) -> None:
        with suppress(OSError):
            super().log_trial_result(iteration, trial, result)

    def log_trial_end(self, trial: Any, failed: bool = False) -> None:
        with suppress(OSError):
            super().log_trial_end(trial, failed)


class TuneSearch:
    """A study in a journal, and the means to continue it.

    Attributes:
        finished: The trials that have ended.
        interrupted: Trials that a killed driver left running, and that count as failed now.
    """

    def __init__(
        self,
        path: Path,
        space: SearchSpace,
        settings: SearchSettings,
        goals: Sequence[tuple[str, Goal]],
        submit: Submit = write_in_foreground,
        trials_per_pass: int = 1,
    ) -> None:
        """Open or create the study; trials that a killed driver left running count as failed.

        Args:
            path: The journal.
            space: Where plans come from; unchanged over the study's life.
            settings: How many plans, and how they are chosen.
            goals: Names and goals of the objectives, in the recipe's order.
            submit: Runs the writes to the journal; in the foreground by default.
            trials_per_pass: Plans that a replica evaluates at once.
        """
        self._trials_per_pass = trials_per_pass
        self._space, self._settings, self._submit = space, settings, submit
        self._goals = list(goals)
        self._storage = open_storage(path, submit)
        self._study = open_study(self._storage, [goal for _, goal in self._goals])
        self.interrupted = self._end_interrupted()
        self.finished = finished_trials(self._study, space)
        self._known = len(self._study.get_trials(deepcopy=False))

    def _end_interrupted(self) -> int:
        return end_interrupted_trials(self._study, [name for name, _ in self._goals])

    def run(
        self,
        pool: ReplicaPool,
        setup: Reference[TrialSetup],
        initial_points: Sequence[Mapping[str, ParameterValue]],
        on_trial: OnTrial,
        storage: Path,
        report: ReportEvent = lambda event, **details: None,
    ) -> None:
        """Try plans until the study has as many as the recipe wants; Ctrl-C ends it early.

        Args:
            pool: Evaluates the plans.
            setup: What all trials share.
            initial_points: Points to try first, in a new study.
            on_trial: Called for each trial as it ends, with its answers if they are recorded.
            storage: Folder for Tune's own files.
            report: Called with the name of each event, and its details.
        """
        replicas = pool.layout.replicas
        config = RunConfig(
            name="search",
            storage_path=str(storage.resolve()),
            verbose=0,
            callbacks=[_RecoveryReporter(report), _TensorBoardLogger()],
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            failure_config=tune.FailureConfig(max_failures=MOST_DEATHS),
        )
        search = _RunningSearch(pool, setup, initial_points, on_trial, config)
        with _terminated_like_interrupted() as terminated:
            while (missing := self._settings.trials - len(self.finished)) > 0:
                replicas = max(replicas, pool.replicas)
                again = self._round(search, missing, replicas)
                interrupted = self._end_interrupted()
                self.finished = finished_trials(self._study, self._space)
                self._known = len(self._study.get_trials(deepcopy=False))
                if not again or interrupted or terminated.is_set():
                    break

    def _round(self, search: "_RunningSearch", missing: int, replicas: int) -> bool:
        """Try plans in slots for so many replicas.

        Returns:
            Whether another round has to follow: there are more replicas now, or processes of
            trials died.
        """
        concurrency = self._settings.concurrency or replicas * self._trials_per_pass
        batch = concurrency if self._settings.batch_synchronous else None
        pool = search.pool

        def add_threshold(losses: tuple[float, ...]) -> None:
            """Count the losses once what came before, the trial among it, is on the disk."""
            self._submit(lambda: start_actor_call(pool.actor, PoolActor.add_threshold, losses))

        def take_answers(trial_id: str) -> Answers:
            return call_actor(pool.actor, PoolActor.take_answers, trial_id)

        points = [dict(point) for point in search.initial_points[:missing]]
        searcher = TuneSearcher(
            self._space,
            OutcomeHandlers(search.on_trial, add_threshold, take_answers),
            concurrency + 1,
            (lambda: False) if self._settings.concurrency else _Outgrown(pool, replicas),
            batch,
            metric=[name for name, _ in self._goals],
            mode=["min" if goal == "minimize" else "max" for _, goal in self._goals],
            points_to_evaluate=points if self._known == 0 else None,
            sampler=make_sampler(self._settings, self._known),
            study_name=STUDY_NAME,
            storage=self._storage,
        )
        trainable = tune.with_parameters(
            PlanTrial,
            pool=pool.actor,
            setup=[search.setup.handle],
            per_pass=self._trials_per_pass,
        )
        slot = int(10_000 / concurrency) / 10_000
        trainable = tune.with_resources(trainable, PlacementGroupFactory([{HEAD: slot}]))
        trainable.__qualname__ = PlanTrial.__qualname__  # what dashboard and `ps` call the process
        thresholds = ThresholdSet.of(self.finished) if self._settings.dominance_stop else None
        slots = min(concurrency, missing)
        call_actor(pool.actor, PoolActor.begin_round, slots, thresholds)
        with _tune_environment(concurrency):
            tune.Tuner(
                trainable,
                tune_config=TuneConfig(
                    search_alg=searcher,
                    num_samples=missing,
                    reuse_actors=True,
                    trial_dirname_creator=lambda trial: trial.trial_id,
                ),
                run_config=search.config,
            ).fit()
        searcher.report_outcomes()
        return searcher.ended_to_grow or 0 < searcher.lost < missing


@dataclass(frozen=True)
class _RunningSearch:
    """What all rounds of one `TuneSearch.run` share; see there."""

    pool: ReplicaPool
    setup: Reference[TrialSetup]
    initial_points: Sequence[Mapping[str, ParameterValue]]
    on_trial: OnTrial
    config: RunConfig


class _Outgrown:
    """Tells whether there have been more replicas than a round has slots for, for a while."""

    def __init__(self, pool: ReplicaPool, replicas: int) -> None:
        self._pool, self._replicas = pool, replicas
        self._since: float | None = None

    def __call__(self) -> bool:
        if self._pool.replicas <= self._replicas:
            self._since = None
            return False
        self._since = self._since or time.monotonic()
        return time.monotonic() - self._since > GROWTH_SECONDS


@contextmanager
def _tune_environment(concurrency: int) -> Iterator[None]:
    """Set what Tune reads from the environment only, for the time of one round."""
    wanted: dict[str, str | None] = {
        **dict.fromkeys(SHOWN_BY_TUNE),
        "TUNE_MAX_PENDING_TRIALS_PG": str(concurrency),
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        # its own state, which nobody reads; a full disk would end the search
        "TUNE_GLOBAL_CHECKPOINT_S": "inf",
        "RAY_AIR_NEW_OUTPUT": "0",
        "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    }
    before = {name: os.environ.get(name) for name in wanted}
    _set(wanted)
    # what they would say, our own events say
    loud = [logging.getLogger(name) for name in ("ray.tune", "ray.air", "ray.train")]
    levels = [logger.level for logger in loud]
    for logger in loud:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        _set(before)
        for logger, level in zip(loud, levels, strict=True):
            logger.setLevel(level)


def _set(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@contextmanager
def _terminated_like_interrupted() -> Iterator[threading.Event]:
    """End the search on SIGTERM (pre-emption, `ray job stop`) as on Ctrl-C: trials stay finished.

    Yields:
        An event that is set once the signal has come.
    """
    terminated = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield terminated
        return

    def interrupt(*_: object) -> None:
        terminated.set()
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield terminated
    finally:
        signal.signal(signal.SIGTERM, before)
