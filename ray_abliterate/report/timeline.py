"""Reconstruct when each replica evaluated what, and which events happened meanwhile.

Sources are the study's journal, the run's trials and its events. Times are those of the driver's
clock, without a zone: the journal's are converted to the zone that the run began in.
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
"""The event that ends an outage, by the event that begins it."""
INTERRUPTED = "interrupted"
"""Outcome of a trial that is in the journal and that the run does not count."""


@dataclass(frozen=True)
class TimelineSpan:
    """The time in which a plan was evaluated, or in flight.

    Where the replica is known, the span ends when the outcome was reported and is as long as the
    evaluation took; otherwise it starts when the plan was asked for.

    Attributes:
        number: The trial.
        start: Driver's clock, without a zone.
        end: The same.
        outcome: `finished`, `stopped early`, `failed` or `interrupted`.
        seconds: Duration of the evaluation, if it is known.
        lane: Row of the figure. A replica has one for each plan that it evaluated at once, and a
            plan takes the first that is free; plans without a known replica come last.
        replica: Its name, or nothing.
    """

    number: int
    start: datetime
    end: datetime
    outcome: str
    seconds: float | None
    lane: int
    replica: str = ""


@dataclass(frozen=True)
class TimelineEvent:
    """Something that happened to `who`; it has an `end` if it is an outage that was over."""

    who: str
    time: datetime
    end: datetime | None
    text: str


@dataclass(frozen=True)
class Timeline:
    """A search over time: spans of its plans, and events."""

    spans: tuple[TimelineSpan, ...]
    events: tuple[TimelineEvent, ...]

    @classmethod
    def read(cls, directory: RunDirectory) -> "Timeline":
        """Read a run directory; what it does not record is left out, not guessed."""
        zone = _zone(str(directory.read_environment().get("started", "")))
        trials = {trial.number: trial for trial in directory.trials()}
        return cls(_spans(directory, trials, zone), _timeline_events(directory.events()))

    @property
    def lanes(self) -> int:
        """The number of rows that spans take."""
        return 1 + max((span.lane for span in self.spans), default=-1)

    @property
    def names(self) -> dict[str, float]:
        """The middle of each replica's lanes; plans without a known replica have the empty name."""
        lanes: dict[str, set[int]] = {}
        for span in sorted(self.spans, key=lambda span: span.lane):
            lanes.setdefault(span.replica, set()).add(span.lane)
        return {name: (min(rows) + max(rows)) / 2 for name, rows in lanes.items()}


def outcome_of(trial: Trial) -> str:
    """Return a trial's outcome in a word or two."""
    if trial.scorecard is None:
        return "failed"
    return "stopped early" if trial.pruned else "finished"


def _zone(started: str) -> tzinfo | None:
    """Return the zone that a run began in, or None, which stands for this machine's."""
    with suppress(ValueError):
        return datetime.strptime(started, "%Y-%m-%dT%H:%M:%S%z").tzinfo
    return None


def _spans(
    directory: RunDirectory, trials: Mapping[int, Trial], zone: tzinfo | None
) -> tuple[TimelineSpan, ...]:
    """Return spans in lanes: a replica's together, and plans without a known replica last."""
    by_replica: dict[str, list[TimelineSpan]] = {}
    for number, *times in _journal_times(directory):
        start, end = (time.astimezone(zone).replace(tzinfo=None) for time in times)
        trial = trials.get(number)
        outcome = outcome_of(trial) if trial else INTERRUPTED
        seconds, replica = (trial.seconds, trial.replica) if trial else (None, "")
        if replica and seconds is not None:
            start = max(start, end - timedelta(seconds=seconds))
        span = TimelineSpan(number, start, end, outcome, seconds, 0, replica)
        by_replica.setdefault(replica, []).append(span)
    spans: list[TimelineSpan] = []
    for name in sorted(by_replica, key=_replica_order):
        first = 1 + max((span.lane for span in spans), default=-1)
        spans += _in_lanes(by_replica[name], first)
    return tuple(spans)


def _replica_order(name: str) -> tuple[bool, list[tuple[int, str]]]:
    """Return a sort key that orders replicas by their numbers, and puts the empty name last."""
    words = [(int(word), "") if word.isdigit() else (-1, word) for word in name.split()]
    return not name, words


def _in_lanes(spans: Iterable[TimelineSpan], first: int) -> list[TimelineSpan]:
    """Place each span in the first lane that is free when it starts."""
    free_at: list[datetime] = []  # by lane
    placed = []
    for span in sorted(spans, key=lambda span: (span.start, span.number)):
        lane = next((i for i, end in enumerate(free_at) if end <= span.start), len(free_at))
        free_at[lane : lane + 1] = [span.end]
        placed.append(replace(span, lane=first + lane))
    return placed


def _journal_times(directory: RunDirectory) -> Iterable[tuple[int, datetime, datetime]]:
    """Return number, start and end of each plan in the journal whose outcome is known."""
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


def _timeline_events(events: Iterable[Mapping[str, Any]]) -> tuple[TimelineEvent, ...]:
    """Return outages with their ends, and all other events."""
    timeline: list[TimelineEvent] = []
    open_outages: dict[tuple[str, str], int] = {}  # (the event that ends it, whom): index
    for event in events:
        try:
            kind, time = str(event["event"]), datetime.fromisoformat(event["time"])
            who, text = _who(event), _text(event)
        except (KeyError, TypeError, ValueError):
            continue  # a line of another version, or a torn one
        index = open_outages.pop((kind, who), None)
        if index is not None:
            begun = timeline[index]
            timeline[index] = TimelineEvent(who, begun.time, time, f"{begun.text}; {text}")
            continue
        if kind in ENDS:
            open_outages[ENDS[kind], who] = len(timeline)
        timeline.append(TimelineEvent(who, time, None, text))
    return tuple(timeline)


def _who(event: Mapping[str, Any]) -> str:
    """Return whom an event is about: a node, the disk, a replica, or the search."""
    if "node" in event:
        return f"node {event['node']}"
    if str(event["event"]).startswith("disk-"):
        return "disk"
    return str(event.get("replica") or event.get("dead") or "search")


def _text(event: Mapping[str, Any]) -> str:
    with suppress(KeyError, ValueError):
        return event_text(dict(event)) or str(event["event"])
    return str(event["event"])
