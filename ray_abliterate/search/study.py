"""The study: Optuna's journal of all points tried. The one source of truth for resuming.

Knows Optuna, and of Ray only the names in a trial's result.

A bounded trial is told as COMPLETE, with its bounds for values. They are all that is certain of it:
a failure would teach the sampler nothing of a point that is known to be bad, and any larger number
would be invented. A finished trial dominates the bounds (strictly, see `dominance`), so the point
ranks behind it with the sampler, and is never among the study's `best_trials`. The sampler takes it
for less bad than it may be.
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
from ray_abliterate.search.journal import MemoryJournal, Submit, at_once
from ray_abliterate.search.score import Scorecard
from ray_abliterate.search.space import CategoricalRange, SearchSpace
from ray_abliterate.search.tpe_sampler import QuickSampler

log = logging.getLogger(__name__)

STUDY_NAME = "ray_abliterate"
INTERRUPTED = "interrupted"
"""Attribute of a trial in the journal that was cut off, and does not count."""
BOUNDED = "bounded"
"""Attribute of a trial in the journal whose values are only bounds; for people who look there."""


def open_storage(journal: Path, submit: Submit = at_once) -> JournalStorage:
    """The journal as a storage; a torn last line (power loss) is cut off first.

    Only the driver that holds the run opens it, so a lock that is there was left by one that was
    killed while it wrote. Optuna would wait half a minute for it, and for ever if the path is
    relative (the lock is a symbolic link, and is then a dangling one).

    Args:
        journal: The file.
        submit: Takes the writes; in the foreground if unset.

    Raises:
        SearchError: a line in the middle is damaged.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    journal.with_name(journal.name + ".lock").unlink(missing_ok=True)
    _mend(journal)
    return JournalStorage(MemoryJournal(journal, submit))


def _mend(journal: Path) -> None:
    if not journal.exists():
        return
    data = journal.read_bytes()
    lines = data.splitlines(keepends=True)
    good = 0
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
                    "  Restore the file from a copy, or delete that line: the trials of the other "
                    "lines are kept."
                )
            log.warning("%s: the last line is torn and was cut off", journal)
            kept = journal.with_suffix(".journal.mending")
            kept.write_bytes(data[:good])
            kept.replace(journal)
        good += len(line)


def distributions(space: SearchSpace) -> dict[str, BaseDistribution]:
    """The space in Optuna's terms."""
    return {
        name: CategoricalDistribution(domain.options)
        if isinstance(domain, CategoricalRange)
        else FloatDistribution(domain.low, domain.high)
        for name, domain in space.parameters
    }


def sampler(settings: SearchSettings, known: int) -> QuickSampler:
    """Multivariate TPE that keeps away from points in flight (constant liar).

    The seed moves with the number of known trials, or a resumed study would draw its start-up
    points again.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return QuickSampler(
            n_startup_trials=settings.startup,
            n_ei_candidates=settings.ei_candidates,
            multivariate=True,
            constant_liar=True,
            seed=settings.seed + known,
        )


def open_study(storage: JournalStorage, directions: Sequence[str]) -> Any:
    """The study in a storage, made if it isn't there."""
    return optuna.create_study(
        storage=storage,
        study_name=STUDY_NAME,
        directions=list(directions),
        load_if_exists=True,
    )


def reap(study: Any, names: Sequence[str]) -> int:
    """End every trial that a killed driver left RUNNING; how many of them count for nothing.

    One whose scores are in the journal already is finished: it waited for its batch.

    Args:
        study: The study.
        names: Of its objectives.
    """
    ghosts = [t for t in study.get_trials(deepcopy=False) if t.state == TrialState.RUNNING]
    interrupted = 0
    for ghost in ghosts:
        if SCORES in ghost.user_attrs:
            card = Scorecard.from_list(json.loads(ghost.user_attrs[SCORES]))
            study.tell(ghost.number, [card[name].value for name in names])
        elif ERROR in ghost.user_attrs:
            study.tell(ghost.number, state=TrialState.FAIL)
        else:
            study._storage.set_trial_user_attr(ghost._trial_id, INTERRUPTED, True)
            study.tell(ghost.number, state=TrialState.FAIL)
            interrupted += 1
    return interrupted


def outcomes(study: Any, space: SearchSpace) -> tuple[Trial, ...]:
    """Every trial that ended with scores or an error of its own; interrupted ones don't count."""
    found = []
    for frozen in study.get_trials(deepcopy=False):
        trial = _outcome(frozen, space)
        if trial is not None:
            found.append(trial)
    return tuple(found)


def _outcome(frozen: FrozenTrial, space: SearchSpace) -> Trial | None:
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
