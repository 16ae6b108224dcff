"""The searcher: OptunaSearch over the run's journal, which is written before anybody is told."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray.tune.search.optuna import OptunaSearch

from ray_abliterate.cluster.tune_trial import ERROR, REPLICA, SCORES, SECONDS, SHARED
from ray_abliterate.search import study as journal
from ray_abliterate.search.frontier import Trial
from ray_abliterate.search.plan import Space
from ray_abliterate.search.score import Scorecard

OnTrial = Callable[[Trial, tuple[dict[str, Any], ...]], None]


class JournalSearch(OptunaSearch):  # type: ignore[misc]
    """OptunaSearch that writes scores and reasons into the journal before it tells the outcome.

    One plan more is out than can be evaluated, so that no replica waits for the sampler. In batches
    (`batch`), plans are asked for and told so many at a time, in order: what the sampler knows, and
    the bar, then depend on no timing.
    """

    def __init__(
        self,
        space: Space,
        on_trial: OnTrial,
        raise_bar: Callable[[tuple[float, ...]], None],
        take: Callable[[str], tuple[dict[str, Any], ...]],
        most_live: int,
        outgrown: Callable[[], bool],
        batch: int | None = None,
        **options: Any,
    ) -> None:
        """See `Search.run`.

        Args:
            space: Where plans come from.
            on_trial: Told of each trial that ended.
            raise_bar: Told the losses of trials that count for the dominance stop.
            take: The recorded answers of a Tune trial.
            most_live: Plans that are out at once, the one that waits among them.
            outgrown: Whether there are replicas that the slots of this round leave idle.
            batch: Plans that are asked for together and told together.
            options: Of OptunaSearch.
        """
        super().__init__(journal.distributions(space), **options)
        self._plans, self._on_trial, self._raise_bar, self._take = space, on_trial, raise_bar, take
        self._most_live, self._outgrown, self._batch = most_live, outgrown, batch
        self.ended_to_grow = False
        self.lost = 0
        """Trials whose process died, and that Tune gave up; their plans wait in the study."""
        self._asked_in_batch = 0
        self._ended: dict[str, tuple[dict[str, Any], bool]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its searcher to restore it, which is the journal's business."""
        return {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next plan; nothing while enough plans are out (each is asked for as late as can be,
        so that the sampler knows most); the end of the round if there are too few slots."""
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
        """Journal first, then everybody else; a batch's outcomes are told together."""
        if trial_id not in self._ot_trials or trial_id in {*self._completed_trials, *self._ended}:
            return
        self._note(trial_id, result or {}, error)
        self._ended[trial_id] = (result or {}, error)
        if self._batch is not None and len(self._ended) < self._batch and not self._last_batch:
            return
        self._tell_all()

    def _tell_all(self) -> None:
        """The sampler and the run hear of what has ended, in order of number."""
        self._asked_in_batch = 0
        ended = sorted(self._ended, key=lambda trial: self._ot_trials[trial].number)
        for trial in ended:
            self._tell(trial, *self._ended[trial])
        self._ended.clear()

    @property
    def _last_batch(self) -> bool:
        """Whether all that are out have ended: a search ends with a smaller batch."""
        return len(self._ended) == len(self._ot_trials) - len(self._completed_trials)

    def _note(self, trial_id: str, result: dict[str, Any], error: bool) -> None:
        """What is known of an outcome goes into the journal at once."""
        asked = self._ot_trials[trial_id]
        if SCORES in result:
            asked.set_user_attr(SCORES, result[SCORES])
            asked.set_user_attr(SECONDS, result[SECONDS])
            if result.get(REPLICA):
                asked.set_user_attr(REPLICA, result[REPLICA])
            if result.get(SHARED):
                asked.set_user_attr(SHARED, True)
            if Scorecard.from_list(json.loads(result[SCORES])).bounded:
                asked.set_user_attr(journal.BOUNDED, True)
        elif ERROR in result:
            asked.set_user_attr(ERROR, result[ERROR])
        else:
            asked.set_user_attr(journal.INTERRUPTED, True)
            if error:
                self.lost += 1
                self._ot_study.enqueue_trial(asked.params)

    def _tell(self, trial_id: str, result: dict[str, Any], error: bool) -> None:
        """Tell the sampler and the run of one outcome."""
        asked = self._ot_trials[trial_id]
        answers: tuple[dict[str, Any], ...] = ()
        if SCORES in result:
            answers = self._take(trial_id)
            super().on_trial_complete(trial_id, result)
        else:
            super().on_trial_complete(trial_id, None, error=True)
        frozen = self._ot_study._storage.get_trial(asked._trial_id)
        trial = journal._outcome(frozen, self._plans)
        if trial is not None:
            if trial.scorecard is not None and not trial.bounded:
                self._raise_bar(trial.scorecard.losses)
            self._on_trial(trial, answers)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the journal has it all."""
        Path(checkpoint_path).write_text("{}", encoding="utf-8")
