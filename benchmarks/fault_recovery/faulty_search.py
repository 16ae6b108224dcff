"""A search over stand-ins for replicas, and a thread that causes a fault in the middle of it."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.fault_recovery.outcome import Outcome, check, wait_until
from benchmarks.harness.default_search import GOALS


class FaultySearch:
    """A search on the cluster that this process is connected to.

    Attributes:
        folder: Folder of its files, and of the files that make its replicas misbehave.
        trials: Trials in all.
        seconds: Time of a trial.
        ended: Moment of the end and trial, in the order in which they ended.
        events: What happened to pool and trials.
        pool: The replica pool, while `run` runs.
    """

    def __init__(
        self,
        folder: Path,
        trials: int = 14,
        seconds: float = 0.4,
        timeout: float | None = None,
        **model: Any,
    ) -> None:
        """Describe a search.

        Args:
            folder: An empty folder.
            trials: Trials in all.
            seconds: Time of a trial.
            timeout: `search.trial_timeout_seconds`.
            **model: Values of the recipe's `[model]`, beyond two replicas of a thread each.
        """
        self.folder, self.trials, self.seconds, self._timeout = folder, trials, seconds, timeout
        replicas = {"replicas": 2, "gpus_per_replica": 0, "threads_per_replica": 1}
        self._model = {"name": "stand-in", **replicas, **model}
        self.ended: list[tuple[float, Any]] = []
        self.events: list[dict[str, Any]] = []
        self.pool: Any = None
        self._errors: list[BaseException] = []

    def run(
        self, fault: Callable[["FaultySearch"], None], after: int = 3, replicas: int = 2
    ) -> Outcome:
        """Run the search with a fault, and return what it cost.

        Args:
            fault: Causes the fault.
            after: Trials that have finished by then.
            replicas: Replicas that must be up before the search begins.

        Raises:
            AssertionError: A finished trial was lost, or the study does not end at its number.
        """

        from benchmarks.harness.stand_ins import FaultyReplica
        from ray_abliterate.cluster.events import event_text
        from ray_abliterate.cluster.pool import ReplicaPool
        from ray_abliterate.cluster.replica_actor import ReplicaSpec
        from ray_abliterate.cluster.tune_search import TuneSearch
        from ray_abliterate.recipe import ModelSettings, SearchSettings, SpaceSettings
        from ray_abliterate.search.plan import ModelShape
        from ray_abliterate.search.space import SearchSpace

        space = SearchSpace.of(ModelShape(8, 32, ("attn", "mlp")), SpaceSettings(), "none")
        model = ModelSettings.model_validate(self._model)
        spec = ReplicaSpec(FaultyReplica, (str(self.folder), self.seconds), model)
        settings = SearchSettings(trials=self.trials, dominance_stop=False)
        search = TuneSearch(self.folder / "study.journal", space, settings, GOALS)
        on_trial = lambda trial, answers: self.ended.append((time.monotonic(), trial))  # noqa: E731
        report = lambda event, **details: self.events.append({"event": event, **details})  # noqa: E731
        moment: list[float] = []
        with ReplicaPool.of(spec, self._timeout, self.events.append) as self.pool:
            wait_until(lambda: self.pool.replicas >= replicas)
            thread = threading.Thread(target=self._cause, args=(fault, after, moment))
            thread.start()
            search.run(self.pool, self.pool.put(None), (), on_trial, self.folder / "tune", report)
            thread.join()
            time.sleep(1.5)  # the last events arrive a second later
        if self._errors:
            raise self._errors[0]
        seen = tuple(text for text in map(event_text, self.events) if text)
        return self._outcome(moment[0], space, seen)

    def _cause(
        self, fault: Callable[["FaultySearch"], None], after: int, moment: list[float]
    ) -> None:
        """Cause the fault in time, and note the moment."""
        try:
            wait_until(lambda: len(self.ended) >= after)
            fault(self)
        except BaseException as error:  # noqa: BLE001  # raised by `run`
            self._errors.append(error)
        moment.append(time.monotonic())

    def _outcome(self, moment: float, space: Any, seen: tuple[str, ...]) -> Outcome:
        from ray_abliterate.search.study import finished_trials, open_storage, open_study

        storage = open_storage(self.folder / "study.journal")
        trials = finished_trials(open_study(storage, [goal for _, goal in GOALS]), space)
        before = [trial.number for at, trial in self.ended if at <= moment]
        lost = set(before) - {trial.number for trial in trials}
        check(not lost, f"trials {sorted(lost)} are lost")
        check(len(trials) == self.trials, f"{len(trials)} trials instead of {self.trials}")
        after = [at for at, _ in self.ended if at > moment]
        plans = [entry["plan"] for entry in self.evaluations()]
        return Outcome(
            len(before),
            len(lost),
            len(plans) - len(set(plans)),
            sum(trial.error is not None for trial in trials),
            round(min(after, default=moment) - moment, 2),
            seen,
        )

    def evaluations(self) -> list[dict[str, Any]]:
        """Return an entry for every evaluation that was begun."""
        file = self.folder / "evaluations.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()]
