"""Records what happens during a run: in its directory, in the background, and on the display."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from ray_abliterate.cluster.events import event_text, timestamp
from ray_abliterate.pipeline.background_writer import BackgroundWriter
from ray_abliterate.pipeline.directory import RunDirectory
from ray_abliterate.pipeline.progress import Progress
from ray_abliterate.search.frontier import Trial


class EventRecorder:
    """Writes events, trials and warnings into a run directory, and reports them to a display.

    Events and trials are written by `writer`, a thread; enter it as a context before use.
    """

    def __init__(self, directory: RunDirectory, progress: Progress) -> None:
        self._directory, self._progress = directory, progress
        self.writer = BackgroundWriter(self.notify)

    def record(self, event: Mapping[str, Any]) -> None:
        """Append an event to `events.jsonl`, and show it if it has a text for people."""
        text = event_text(dict(event))
        if text:
            self._progress.note(text)
        self.writer.submit(partial(self._directory.append_event, event))

    def notify(self, event: str, **details: Any) -> None:
        """Record an event of the driver's own, with the time of the call."""
        self.record({"time": timestamp(), "event": event, **details})

    def record_trial(self, trial: Trial, answers: tuple[dict[str, Any], ...]) -> None:
        """Append a finished or failed trial to `trials.jsonl`, and save its answers if any."""
        self.writer.submit(partial(self._directory.append_trial, trial))
        if answers:
            save = partial(self._directory.save_responses, trial.number, list(answers))
            self.writer.submit(save)

    def warn(self, text: str) -> None:
        """Show a warning now, and list it once in the report."""
        self._progress.note(f"warning: {text}")
        warnings = self._directory.read_environment().get("warnings", [])
        if text not in warnings:
            self._directory.record_facts(warnings=[*warnings, text])
