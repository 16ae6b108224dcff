"""The searcher: OptunaSearch over the run's journal, written before an outcome is reported."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.tune.search.optuna import OptunaSearch

from ray_abliterate.search.frontier import ERROR, REPLICA, SCORES, SECONDS, SHARED, Trial
from ray_abliterate.search.score import Scorecard
from ray_abliterate.search.space import SearchSpace
from ray_abliterate.search.study import INTERRUPTED, PRUNED, optuna_distributions, read_trial

Answers = tuple[dict[str, Any], ...]
"""Recorded rows of prompt, answer and verdict."""
OnTrial = Callable[[Trial, Answers], None]


@dataclass(frozen=True)
class OutcomeHandlers:
    """What is done with the outcome of a trial.

    Attributes:
        on_trial: Called with each trial that ended, and its answers.
        add_threshold: Called with the losses of each trial that counts for early stopping.
        take_answers: Returns the recorded answers of a Tune trial.
    """

    on_trial: OnTrial
    add_threshold: Callable[[tuple[float, ...]], None]
    take_answers: Callable[[str], Answers]


class TuneSearcher(OptunaSearch):  # type: ignore[misc]
    """OptunaSearch that writes scores and reasons into the journal before it reports an outcome.

    One plan more is out than can be evaluated, so that no replica waits for the sampler. In batches
    (`batch`), plans are asked for and reported so many at a time, in order: what the sampler knows,
    and the thresholds, then depend on no timing.

    Attributes:
        ended_to_grow: The round was ended because there are more replicas now.
        lost: Trials whose process died, and that Tune gave up; their plans wait in the study.
    """

    def __init__(
        self,
        space: SearchSpace,
        handlers: OutcomeHandlers,
        most_live: int,
        outgrown: Callable[[], bool],
        batch: int | None = None,
        **options: Any,
    ) -> None:
        """Open the study; see `TuneSearch.run`.

        Args:
            space: Where plans come from.
            handlers: What is done with outcomes.
            most_live: Plans that are out at once, the one that waits among them.
            outgrown: Whether there are replicas that the slots of this round leave idle.
            batch: Plans that are asked for together and reported together.
            options: Those of OptunaSearch.
        """
        super().__init__(optuna_distributions(space), **options)
        self._plans, self._handlers = space, handlers
        self._most_live, self._outgrown, self._batch = most_live, outgrown, batch
        self.ended_to_grow = False
        self.lost = 0
        self._asked_in_batch = 0
        self._ended: dict[str, tuple[dict[str, Any], bool]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Return nothing: Tune pickles its searcher to restore it, which is the journal's job."""
        return {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Return the parameters of the next plan, and the plan.

        Each is asked for as late as possible, so that the sampler knows most: None while enough
        plans are out. `FINISHED` ends a round that has too few slots.
        """
        self.ended_to_grow = self.ended_to_grow or self._outgrown()
        if self.ended_to_grow:
            return str(self.FINISHED)
        live = len(self._ot_trials) - len(self._completed_trials)
        if self._batch is not None:
            if self._asked_in_batch == self._batch:
                return None
            self._asked_in_batch += 1
        elif live >= self._most_live:
            return None
        super().suggest(trial_id)
        params = self._ot_trials[trial_id].params
        return {**params, "plan": self._plans.plan(params).to_json()}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Write the outcome into the journal, then report it; a batch's outcomes together."""
        if trial_id not in self._ot_trials or trial_id in {*self._completed_trials, *self._ended}:
            return
        self._write(trial_id, result or {}, error)
        self._ended[trial_id] = (result or {}, error)
        if self._batch is not None and len(self._ended) < self._batch and not self._last_batch:
            return
        self.report_outcomes()

    def report_outcomes(self) -> None:
        """Report what has ended to the sampler and the run, in order of number."""
        self._asked_in_batch = 0
        ended = sorted(self._ended, key=lambda trial: self._ot_trials[trial].number)
        for trial in ended:
            self._report(trial, self._ended[trial][0])
        self._ended.clear()

    @property
    def _last_batch(self) -> bool:
        """Whether all that are out have ended: a search ends with a smaller batch."""
        return len(self._ended) == len(self._ot_trials) - len(self._completed_trials)

    def _write(self, trial_id: str, result: dict[str, Any], error: bool) -> None:
        """Write what is known of an outcome into the journal."""
        asked = self._ot_trials[trial_id]
        if SCORES in result:
            asked.set_user_attr(SCORES, result[SCORES])
            asked.set_user_attr(SECONDS, result[SECONDS])
            if result.get(REPLICA):
                asked.set_user_attr(REPLICA, result[REPLICA])
            if result.get(SHARED):
                asked.set_user_attr(SHARED, True)
            if Scorecard.from_list(json.loads(result[SCORES])).pruned:
                asked.set_user_attr(PRUNED, True)
        elif ERROR in result:
            asked.set_user_attr(ERROR, result[ERROR])
        else:
            asked.set_user_attr(INTERRUPTED, True)
            if error:
                self.lost += 1
                self._ot_study.enqueue_trial(asked.params)

    def _report(self, trial_id: str, result: dict[str, Any]) -> None:
        """Report one outcome to the sampler and the run."""
        asked = self._ot_trials[trial_id]
        answers: Answers = ()
        if SCORES in result:
            answers = self._handlers.take_answers(trial_id)
            super().on_trial_complete(trial_id, result)
        else:
            super().on_trial_complete(trial_id, None, error=True)
        frozen = self._ot_study._storage.get_trial(asked._trial_id)
        trial = read_trial(frozen, self._plans)
        if trial is not None:
            if trial.scorecard is not None and not trial.pruned:
                self._handlers.add_threshold(trial.scorecard.losses)
            self._handlers.on_trial(trial, answers)

    def save(self, checkpoint_path: str) -> None:
        """Write an empty file: the journal has it all."""
        Path(checkpoint_path).write_text("{}", encoding="utf-8")
