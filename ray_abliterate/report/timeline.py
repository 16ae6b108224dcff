"""Which replica evaluated what and when, and what happened meanwhile, by the study's journal, the
run's trials and its events.

Times are those of the driver's clock, without a zone: the journal's are brought to the zone that
the run began in.
"""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, tzinfo
from typing import Any

from ray_abliterate.cluster.events import event_text
from ray_abliterate.pipeline.directory import RunDirectory
from ray_abliterate.search.frontier import Trial

ENDS = {"replica-lost": "replica-back", "node-lost": "node-joined", "disk-refuses": "disk-back"}
"""What ends an outage, by what begins it."""
INTERRUPTED = "interrupted"
"""What came of a trial that the journal has and the run does not count."""


@dataclass(frozen=True)
class TimelineSpan:
    """A plan that was evaluated, or out.

    Where the replica is known, from so many seconds before its outcome was told as its evaluation
    took; otherwise from when it was asked for. `lane` is one of the replica's, the first that was
    free: it has one for each plan that it evaluated at once. Behind them are lanes of plans whose
    replica is not known.
    """

    number: int
    start: datetime
    end: datetime
    outcome: str
    seconds: float | None
    lane: int
    replica: str = ""


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

    spans: tuple[TimelineSpan, ...]
    happenings: tuple[Happening, ...]

    @classmethod
    def read(cls, directory: RunDirectory) -> "Timeline":
        """What a run directory tells; nothing is made up where it tells nothing."""
        zone = _zone(str(directory.read_environment().get("started", "")))
        known = {trial.number: trial for trial in directory.trials()}
        return cls(_spans(directory, known, zone), _happenings(directory.events()))

    @property
    def lanes(self) -> int:
        """Rows of spans."""
        return 1 + max((span.lane for span in self.spans), default=-1)

    @property
    def names(self) -> dict[str, float]:
        """The middle of each replica's lanes; of the plans' without one under no name."""
        lanes: dict[str, set[int]] = {}
        for span in sorted(self.spans, key=lambda one: one.lane):
            lanes.setdefault(span.replica, set()).add(span.lane)
        return {name: (min(own) + max(own)) / 2 for name, own in lanes.items()}


def outcome_of(trial: Trial) -> str:
    """In a word or two."""
    if trial.scorecard is None:
        return "failed"
    return "stopped early" if trial.pruned else "finished"


def _zone(started: str) -> tzinfo | None:
    """The zone that a run began in; this machine's if that is not known."""
    with suppress(ValueError):
        return datetime.strptime(started, "%Y-%m-%dT%H:%M:%S%z").tzinfo
    return None


def _spans(
    directory: RunDirectory, known: Mapping[int, Trial], zone: tzinfo | None
) -> tuple[TimelineSpan, ...]:
    found: dict[str, list[TimelineSpan]] = {}
    for number, asked, told in _asked(directory):
        start, end = (time.astimezone(zone).replace(tzinfo=None) for time in (asked, told))
        trial = known.get(number)
        outcome = outcome_of(trial) if trial else INTERRUPTED
        seconds, replica = (trial.seconds, trial.replica) if trial else (None, "")
        if replica and seconds is not None:
            start = max(start, end - timedelta(seconds=seconds))
        span = TimelineSpan(number, start, end, outcome, seconds, 0, replica)
        found.setdefault(replica, []).append(span)
    spans: list[TimelineSpan] = []
    for name in sorted(found, key=_place):
        spans += _in_lanes(found[name], 1 + max((span.lane for span in spans), default=-1))
    return tuple(spans)


def _place(name: str) -> tuple[bool, list[tuple[int, str]]]:
    """Orders replicas by their numbers; what has no name comes last."""
    words = [(int(word), "") if word.isdigit() else (-1, word) for word in name.split()]
    return not name, words


def _in_lanes(spans: Iterable[TimelineSpan], first: int) -> list[TimelineSpan]:
    """Each in the first lane that is free when it begins."""
    until: list[datetime] = []
    placed = []
    for span in sorted(spans, key=lambda one: (one.start, one.number)):
        lane = next((i for i, end in enumerate(until) if end <= span.start), len(until))
        until[lane : lane + 1] = [span.end]
        placed.append(replace(span, lane=first + lane))
    return placed


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
        return event_text(dict(event)) or str(event["event"])
    return str(event["event"])
