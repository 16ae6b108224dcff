"""The search: Ray Tune runs OptunaSearch trials over the replica pool.

Trials are thin: no GPU, no model. Each asks the pool to evaluate a plan. Tune reuses the trial
actors; equal shares of the head's own resource limit how many run at once (and keep them beside the
driver's files): without that limit Tune starts and stops a process for nearly every trial. The
journal is the truth for resuming, Tune's own state is not used.
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune import PlacementGroupFactory, RunConfig, TuneConfig
from ray.tune.logger import TBXLoggerCallback

from ray_abliterate.cluster.connection import HEAD
from ray_abliterate.cluster.pool import ReplicaPool
from ray_abliterate.cluster.tune_searcher import JournalSearch, OnTrial
from ray_abliterate.cluster.tune_trial import PlanTrial
from ray_abliterate.recipe import Goal, SearchSettings
from ray_abliterate.search import study as journal
from ray_abliterate.search.dominance import Bar
from ray_abliterate.search.journal import Submit, at_once
from ray_abliterate.search.plan import Space, Value

log = logging.getLogger(__name__)

SHOWN_BY_TUNE = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SECURITY_TOKEN",
    "AWS_SESSION_TOKEN",
)
"""Tune copies these from the driver into its trials' runtime environment, which dashboard and logs
show. Trials have no use for them."""

MOST_DEATHS = 2
"""A trial is begun again that often. Tune hears of a process's death from its task and from its
actor; where it hears twice, it gives the trial up at once, whatever this number."""
GROWTH_SECONDS = 15.0
"""So long after replicas joined, a search makes room for them: others may be on their way."""

Tell = Callable[..., None]


class _Recoveries(tune.Callback):  # type: ignore[misc]
    """Tells of trials whose process died."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its callbacks, to restore them."""
        return {}

    def on_trial_recover(self, **_: Any) -> None:
        """Tune begins the trial again."""
        self._tell("trial-process-lost")


class _Boards(TBXLoggerCallback):  # type: ignore[misc]
    """Tune's files for TensorBoard, as long as the disk takes them: nothing depends on them."""

    def log_trial_start(self, trial: Any) -> None:
        with suppress(OSError):
            super().log_trial_start(trial)

    def log_trial_result(self, iteration: int, trial: Any, result: dict[str, Any]) -> None:
        with suppress(OSError):
            super().log_trial_result(iteration, trial, result)

    def log_trial_end(self, trial: Any, failed: bool = False) -> None:
        with suppress(OSError):
            super().log_trial_end(trial, failed)


class Search:
    """A study in a journal, and the means to go on with it."""

    def __init__(
        self,
        path: Path,
        space: Space,
        settings: SearchSettings,
        goals: Sequence[tuple[str, Goal]],
        submit: Submit = at_once,
        trials_per_pass: int = 1,
    ) -> None:
        """Open or make the study; trials that a killed driver left running are told failed.

        Args:
            path: The journal.
            space: Where plans come from; unchanged over the study's life.
            settings: How many plans, and how they are chosen.
            goals: Names and goals of the objectives, in the recipe's order.
            submit: Takes the writes to the journal; in the foreground if unset.
            trials_per_pass: Plans that a replica gets at once.
        """
        self._trials_per_pass = trials_per_pass
        self._space, self._settings, self._submit = space, settings, submit
        self._goals = list(goals)
        self._storage = journal.open_storage(path, submit)
        self._study = journal.open_study(self._storage, [goal for _, goal in self._goals])
        self.reaped = self._reap()
        self.finished = journal.outcomes(self._study, space)
        self._known = len(self._study.get_trials(deepcopy=False))

    def _reap(self) -> int:
        return journal.reap(self._study, [name for name, _ in self._goals])

    def run(
        self,
        pool: ReplicaPool,
        setup: Any,
        seeds: Sequence[dict[str, Value]],
        on_trial: OnTrial,
        storage: Path,
        tell: Tell = lambda event, **details: None,
    ) -> None:
        """Try plans until the study has as many as the recipe wants; Ctrl-C ends it early.

        Args:
            pool: Evaluates the plans.
            setup: Reference to what all evaluations share.
            seeds: Points to try first, in a new study.
            on_trial: Called for each trial as it ends, with its answers if they are recorded.
            storage: Folder for Tune's own files.
            tell: Told what happened: name of the event, and details.
        """
        replicas = pool.layout.replicas
        own = RunConfig(
            name="search",
            storage_path=str(storage.resolve()),
            verbose=0,
            callbacks=[_Recoveries(tell), _Boards()],
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            failure_config=tune.FailureConfig(max_failures=MOST_DEATHS),
        )
        with _terminated_like_interrupted() as terminated:
            while (missing := self._settings.trials - len(self.finished)) > 0:
                replicas = max(replicas, pool.replicas)
                again = self._round(pool, setup, seeds, on_trial, missing, replicas, own)
                interrupted = self._reap()
                self.finished = journal.outcomes(self._study, self._space)
                self._known = len(self._study.get_trials(deepcopy=False))
                if not again or interrupted or terminated.is_set():
                    break

    def _round(
        self,
        pool: ReplicaPool,
        setup: Any,
        seeds: Sequence[dict[str, Value]],
        on_trial: OnTrial,
        missing: int,
        replicas: int,
        own: RunConfig,
    ) -> bool:
        """Try plans in slots for so many replicas; whether another round has to follow: because
        there are more replicas now, or processes of trials died."""
        concurrency = self._settings.concurrency or replicas * self._trials_per_pass
        batch = concurrency if self._settings.batch_synchronous else None

        def raise_bar(losses: tuple[float, ...]) -> None:
            """Once what came before, the trial among it, is on the disk."""
            self._submit(lambda: pool.actor.raise_bar.remote(losses))

        searcher = JournalSearch(
            self._space,
            on_trial,
            raise_bar,
            lambda trial_id: ray.get(pool.actor.take.remote(trial_id)) or (),
            concurrency + 1,
            (lambda: False) if self._settings.concurrency else _Outgrown(pool, replicas),
            batch,
            metric=[name for name, _ in self._goals],
            mode=["min" if goal == "minimize" else "max" for _, goal in self._goals],
            points_to_evaluate=[dict(s) for s in seeds[:missing]] if self._known == 0 else None,
            sampler=journal.sampler(self._settings, self._known),
            study_name=journal.STUDY_NAME,
            storage=self._storage,
        )
        trainable = tune.with_parameters(
            PlanTrial, pool=pool.actor, setup=[setup], together=self._trials_per_pass
        )
        slot = int(10_000 / concurrency) / 10_000
        trainable = tune.with_resources(trainable, PlacementGroupFactory([{HEAD: slot}]))
        trainable.__qualname__ = PlanTrial.__qualname__  # what dashboard and `ps` call the process
        bar = Bar.of(self.finished) if self._settings.dominance_stop else None
        ray.get(pool.actor.expect.remote(min(concurrency, missing), bar))
        with _tune_environment(concurrency):
            tune.Tuner(
                trainable,
                tune_config=TuneConfig(
                    search_alg=searcher,
                    num_samples=missing,
                    reuse_actors=True,
                    trial_dirname_creator=lambda trial: trial.trial_id,
                ),
                run_config=own,
            ).fit()
        searcher._tell_all()
        return searcher.ended_to_grow or 0 < searcher.lost < missing


class _Outgrown:
    """Whether there have been more replicas than a round has room for, for a while."""

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
    """Settings that Tune reads from the environment only, for the time of one search."""
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
    loud = [logging.getLogger(name) for name in ("ray.tune", "ray.air", "ray.train")]  # we tell
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
    """SIGTERM (pre-emption, `ray job stop`) ends the search as Ctrl-C does: finished is kept.

    Yields what is set by then."""
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
