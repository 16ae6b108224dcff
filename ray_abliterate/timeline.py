"""When trials were out and what happened meanwhile, by the study's journal and the run's events.

Which replica took a trial is not recorded, so it is not told here. Times are those of the driver's
clock, without a zone: the journal's are brought to the zone that the run began in.
"""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, tzinfo
from typing import Any

from ray_abliterate.cluster.events import describe
from ray_abliterate.frontier import Trial
from ray_abliterate.rundir import RunDirectory

ENDS = {"replica-lost": "replica-back", "node-lost": "node-joined", "disk-refuses": "disk-back"}
"""What ends an outage, by what begins it."""
INTERRUPTED = "interrupted"
"""What came of a trial that the journal has and the run does not count."""


@dataclass(frozen=True)
class Span:
    """A plan that was out, from when it was asked for to when its outcome was told.

    `lane` is the first one, from 0, that was free; there is one for each plan out at once.
    """

    number: int
    start: datetime
    end: datetime
    outcome: str
    seconds: float | None
    lane: int


@dataclass(frozen=True)
class Happening:
    """Something that happened to `who`; `end` is there if it was an outage whose end is known."""

    who: str
    time: datetime
    end: datetime | None
    text: str


@dataclass(frozen=True)
class Timeline:
    """A search over time."""

    spans: tuple[Span, ...]
    happenings: tuple[Happening, ...]

    @classmethod
    def read(cls, directory: RunDirectory) -> "Timeline":
        """What a run directory tells; nothing is made up where it tells nothing."""
        zone = _zone(str(directory.environment.get("started", "")))
        known = {trial.number: trial for trial in directory.trials()}
        return cls(_spans(directory, known, zone), _happenings(directory.events()))

    @property
    def lanes(self) -> int:
        """Plans that were out at once, at most."""
        return 1 + max((span.lane for span in self.spans), default=-1)


def outcome_of(trial: Trial) -> str:
    """In a word or two."""
    if trial.scorecard is None:
        return "failed"
    return "stopped early" if trial.bounded else "finished"


def _zone(started: str) -> tzinfo | None:
    """The zone that a run began in; this machine's if that is not known."""
    with suppress(ValueError):
        return datetime.strptime(started, "%Y-%m-%dT%H:%M:%S%z").tzinfo
    return None


def _spans(
    directory: RunDirectory, known: Mapping[int, Trial], zone: tzinfo | None
) -> tuple[Span, ...]:
    free: list[datetime] = []
    spans = []
    for number, asked, told in sorted(_asked(directory), key=lambda one: (one[1], one[0])):
        start, end = (time.astimezone(zone).replace(tzinfo=None) for time in (asked, told))
        lane = next((i for i, until in enumerate(free) if until <= start), len(free))
        free[lane : lane + 1] = [end]
        trial = known.get(number)
        outcome = outcome_of(trial) if trial else INTERRUPTED
        spans.append(Span(number, start, end, outcome, trial.seconds if trial else None, lane))
    return tuple(spans)


def _asked(directory: RunDirectory) -> Iterable[tuple[int, datetime, datetime]]:
    """Number, when asked for, when told, of each plan in the journal whose outcome is known."""
    if not directory.journal.exists():
        return ()
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    storage = JournalStorage(JournalFileBackend(str(directory.journal)))
    return [
        (trial.number, trial.datetime_start, trial.datetime_complete)
        for study in storage.get_all_studies()
        for trial in storage.get_all_trials(study._study_id, deepcopy=False)
        if trial.datetime_start and trial.datetime_complete
    ]


def _happenings(events: Iterable[Mapping[str, Any]]) -> tuple[Happening, ...]:
    """Outages with their ends, and whatever else happened."""
    found: list[Happening] = []
    open_since: dict[tuple[str, str], int] = {}
    for event in events:
        try:
            kind, time = str(event["event"]), datetime.fromisoformat(event["time"])
            who, text = _who(event), _text(event)
        except (KeyError, TypeError, ValueError):
            continue  # a line of another version, or a torn one
        begun = open_since.pop((kind, who), None)
        if begun is not None:
            before = found[begun]
            found[begun] = Happening(who, before.time, time, f"{before.text}; {text}")
            continue
        if kind in ENDS:
            open_since[ENDS[kind], who] = len(found)
        found.append(Happening(who, time, None, text))
    return tuple(found)


def _who(event: Mapping[str, Any]) -> str:
    """Who an event is about."""
    if "node" in event:
        return f"node {event['node']}"
    if str(event["event"]).startswith("disk-"):
        return "disk"
    return str(event.get("replica") or event.get("dead") or "search")


def _text(event: Mapping[str, Any]) -> str:
    with suppress(KeyError, ValueError):
        return describe(dict(event)) or str(event["event"])
    return str(event["event"])
