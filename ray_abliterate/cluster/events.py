"""What happened to the fleet, in order: for the run's `events.jsonl`, and for people."""

import time
from typing import Any, Protocol

TEXTS = {
    "waiting-for-nodes": "{missing} more replicas need {gpus:g} GPUs each, which no node has free; "
    "an autoscaling cluster has been asked for them (Ctrl-C ends the run)",
    "node-joined": "node {node} joined",
    "node-lost": "node {node} was lost, with {replicas} replicas; their trials go to others",
    "replica-lost": "{replica} was lost ({reason}); another is started",
    "replica-back": "{replica} is back after {seconds:.0f} s",
    "replica-failed-to-start": "{replica} could not be started: {reason}",
    "call-moved": "{method}: moved from {dead} to another replica",
    "disk-slow": "the disk is slow: {waiting} results have waited {seconds:.0f} s to be written",
    "disk-refuses": "the run directory can't be written ({reason}); {waiting} results wait in "
    "memory, and are written as soon as it can: free some space",
    "disk-back": "the run directory can be written again; nothing was lost",
    "validation-cancelled": "{model} left the frontier while it was measured; the rest is skipped",
    "validation-failed": "{model} could not be measured: {reason}",
    "validation-stopped": "nothing more is measured until the search ends: {reason}",
    "trial-process-lost": "the process of a trial died; its plan is tried again",
}
"""What people read of each event; events without a text are for the file only."""


class ReportEvent(Protocol):
    """Takes the name of an event, and its details."""

    def __call__(self, event: str, **details: Any) -> None:
        """Record that the event happened now."""
        ...


def event_text(event: dict[str, Any]) -> str:
    """Return one line for people; empty for events that are for the file only."""
    pattern = TEXTS.get(event["event"], "")
    text = pattern.format(**{"reason": "no reason given", **event})
    return text + ("; it will not be tried again" if event.get("given_up") else "")


class EventLog:
    """The events so far, each with its time."""

    def __init__(self) -> None:
        self._entries: list[dict[str, Any]] = []

    def __len__(self) -> int:
        return len(self._entries)

    def report(self, event: str, **details: Any) -> None:
        """Add an event, with the time."""
        self._entries.append({"time": timestamp(), "event": event, **details})

    def since(self, seen: int) -> list[dict[str, Any]]:
        """Return the entries after the first `seen`."""
        return self._entries[seen:]


def timestamp() -> str:
    """Return this machine's time in milliseconds, for people: nothing is computed from it."""
    now = time.time()
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(now)) + f".{int(now % 1 * 1000):03d}"
