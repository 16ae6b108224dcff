"""What happened to the fleet, in order: for the run's `events.jsonl` and for those who watch."""

import time
from typing import Any

WORDS = {
    "waiting-for-nodes": "{missing} more replicas want {gpus:g} GPUs each, which are not there; a "
    "cluster that grows on demand has been asked for them (Ctrl-C ends it)",
    "node-joined": "node {node} joined",
    "node-lost": "node {node} was lost, with {replicas} replicas; their trials go to others",
    "replica-lost": "{replica} was lost ({reason}); another is started",
    "replica-back": "{replica} is back after {seconds:.0f} s",
    "replica-failed-to-start": "{replica} could not be started: {reason}",
    "call-moved": "{method}: moved from {dead} to another replica",
    "disk-slow": "the disk is slow: {waiting} results wait to be written, for {seconds:.0f} s now",
    "disk-refuses": "the run directory can't be written ({reason}); {waiting} results wait in "
    "memory, and are written as soon as it can: free some space",
    "disk-back": "the run directory can be written again; nothing was lost",
    "validation-cancelled": "{model} left the frontier while it was measured; the rest is not",
    "validation-failed": "{model} could not be measured: {reason}",
    "validation-stopped": "nothing is measured while the search goes on: {reason}",
    "trial-process-lost": "the process of a trial died; its plan is tried again",
}
"""How each event reads; events that are not here are for the file only."""


def describe(event: dict[str, Any]) -> str:
    """One line for people; empty for events that are only kept."""
    pattern = WORDS.get(event["event"], "")
    text = pattern.format(**{"reason": "no reason given", **event})
    return text + ("; it is given up" if event.get("given_up") else "")


class Events:
    """A list that grows, each entry with its time."""

    def __init__(self) -> None:
        self._entries: list[dict[str, Any]] = []

    def __len__(self) -> int:
        return len(self._entries)

    def tell(self, event: str, **details: Any) -> None:
        """Something happened."""
        self._entries.append({"time": stamp(), "event": event, **details})

    def since(self, seen: int) -> list[dict[str, Any]]:
        """Entries after the first `seen`."""
        return self._entries[seen:]


def stamp() -> str:
    """The time by this machine's clock, in milliseconds. For people: nothing is computed of it."""
    now = time.time()
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(now)) + f".{int(now % 1 * 1000):03d}"
