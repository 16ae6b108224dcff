"""The study: Optuna's journal of all points tried. The one source of truth for resuming.

Knows Optuna; nothing about Ray, models or scorers.

A pruned trial is reported as COMPLETE, with its bounds for values. They are all that is certain of
it: a failure would teach the sampler nothing about a point that is known to be bad, and any larger
number would be invented. A finished trial dominates the bounds (strictly, see `dominance`), so the
sampler ranks the point behind it, and it is never among the study's `best_trials`. The sampler
takes it for less bad than it may be.
"""

import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.storages import JournalStorage
from optuna.trial import FrozenTrial, TrialState

from ray_abliterate.errors import SearchError
from ray_abliterate.recipe import SearchSettings
from ray_abliterate.search.frontier import ERROR, REPLICA, SCORES, SECONDS, SHARED, Trial
from ray_abliterate.search.journal import MemoryJournal, Submit, write_in_foreground
from ray_abliterate.search.score import Scorecard
from ray_abliterate.search.space import CategoricalRange, SearchSpace
from ray_abliterate.search.tpe_sampler import FastTPESampler

log = logging.getLogger(__name__)

STUDY_NAME = "ray_abliterate"
INTERRUPTED = "interrupted"
"""Attribute in the journal of a trial that was cut off, and does not count."""
PRUNED = "bounded"
"""Attribute in the journal of a pruned trial, whose values are bounds; for people who read it."""


def open_storage(journal: Path, submit: Submit = write_in_foreground) -> JournalStorage:
    """Open the journal as a storage; a torn last line (power loss) is cut off first.

    Only the driver that holds the run opens it, so a lock that is there was left by one that was
    killed while it wrote. Optuna would wait half a minute for it, and for ever if the path is
    relative (the lock is a symbolic link, and is then a dangling one).

    Args:
        journal: The file.
        submit: Runs the writes; in the foreground by default.

    Raises:
        SearchError: a line in the middle is damaged.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    journal.with_name(journal.name + ".lock").unlink(missing_ok=True)
    _cut_torn_line(journal)
    return JournalStorage(MemoryJournal(journal, submit))


def _cut_torn_line(journal: Path) -> None:
    if not journal.exists():
        return
    data = journal.read_bytes()
    lines = data.splitlines(keepends=True)
    good_bytes = 0
    for number, line in enumerate(lines, start=1):
        try:
            json.loads(line)
            whole = line.endswith(b"\n")
        except ValueError:
            whole = False
        if not whole:
            if number < len(lines):
                raise SearchError(
                    f"{journal}: line {number} of {len(lines)} is damaged.\n"
                    "  Restore the file from a copy, or delete that line; the trials on the other "
                    "lines are not lost."
                )
            log.warning("%s: the last line is torn and was cut off", journal)
            mended = journal.with_suffix(".journal.mending")
            mended.write_bytes(data[:good_bytes])
            mended.replace(journal)
        good_bytes += len(line)


def optuna_distributions(space: SearchSpace) -> dict[str, BaseDistribution]:
    """Return the search space as Optuna's distributions."""
    return {
        name: CategoricalDistribution(domain.options)
        if isinstance(domain, CategoricalRange)
        else FloatDistribution(domain.low, domain.high)
        for name, domain in space.parameters
    }


def make_sampler(settings: SearchSettings, known: int) -> FastTPESampler:
    """Make a multivariate TPE sampler that avoids points in flight (constant liar).

    Args:
        settings: The recipe's search.
        known: Trials in the study. The seed moves with their number, or a resumed study would draw
            its start-up points again.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return FastTPESampler(
            n_startup_trials=settings.startup,
            n_ei_candidates=settings.ei_candidates,
            multivariate=True,
            constant_liar=True,
            seed=settings.seed + known,
        )


def open_study(storage: JournalStorage, directions: Sequence[str]) -> Any:
    """Open the study in a storage, or create it."""
    return optuna.create_study(
        storage=storage,
        study_name=STUDY_NAME,
        directions=list(directions),
        load_if_exists=True,
    )


def end_interrupted_trials(study: Any, names: Sequence[str]) -> int:
    """End every trial that a killed driver left RUNNING; return how many of them do not count.

    A trial whose scores are in the journal already is finished: it was waiting for its batch.

    Args:
        study: The study.
        names: The names of its objectives.
    """
    running = [t for t in study.get_trials(deepcopy=False) if t.state == TrialState.RUNNING]
    interrupted = 0
    for trial in running:
        if SCORES in trial.user_attrs:
            card = Scorecard.from_list(json.loads(trial.user_attrs[SCORES]))
            study.tell(trial.number, [card[name].value for name in names])
        elif ERROR in trial.user_attrs:
            study.tell(trial.number, state=TrialState.FAIL)
        else:
            study._storage.set_trial_user_attr(trial._trial_id, INTERRUPTED, True)
            study.tell(trial.number, state=TrialState.FAIL)
            interrupted += 1
    return interrupted


def finished_trials(study: Any, space: SearchSpace) -> tuple[Trial, ...]:
    """Return every trial that ended with scores or its own error; interrupted ones don't count."""
    trials = (read_trial(frozen, space) for frozen in study.get_trials(deepcopy=False))
    return tuple(trial for trial in trials if trial is not None)


def read_trial(frozen: FrozenTrial, space: SearchSpace) -> Trial | None:
    """Return a trial of the journal with its result; None if it is unfinished or interrupted."""
    attributes: Mapping[str, Any] = frozen.user_attrs
    if attributes.get(INTERRUPTED) or not frozen.state.is_finished():
        return None
    seconds = float(attributes.get(SECONDS, 0.0))
    plan = space.plan(frozen.params) if frozen.params else None
    if plan is None:
        return None
    if frozen.state == TrialState.COMPLETE and SCORES in attributes:
        card = Scorecard.from_list(json.loads(attributes[SCORES]))
        return Trial(
            frozen.number,
            plan,
            card,
            seconds,
            shared=bool(attributes.get(SHARED)),
            replica=str(attributes.get(REPLICA, "")),
        )
    return Trial(frozen.number, plan, None, seconds, str(attributes.get(ERROR, "no reason given")))
