"""The frontier is measured while it changes: in order, no longer than it is of interest."""

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ray_abliterate.cli.progress_display import LineDisplay, LiveDisplay
from ray_abliterate.errors import ModelError, ScoreError
from ray_abliterate.pipeline.progress import SilentProgress
from ray_abliterate.pipeline.suite_results import BASE, Finding
from ray_abliterate.pipeline.validation import Validation
from ray_abliterate.replica.messages import ReplicaApi, TrialSetup
from ray_abliterate.replica.replica import Replica
from ray_abliterate.search.frontier import Frontier, Trial
from ray_abliterate.search.plan import Plan
from tests.support.finished_runs import FLAGGED, InProcessPool
from tests.support.run_contexts import run_context

SUITE = {
    "kind": "over-refusal",
    "name": "asked",
    "table": {"file": "asked.jsonl"},
    "category": "",
    "markers": ["sorry"],
    "max_new_tokens": 3,
    "chunk": 2,
}


class Gated(InProcessPool):
    """Measures a chunk only when the test lets it."""

    def __init__(self, replica: Replica) -> None:
        super().__init__(replica)
        self.gate = threading.Semaphore(0)
        self.asked: list[tuple[bool, str]] = []
        self.began = threading.Semaphore(0)
        self.broken = False

    def call(self, method: Any, *args: Any) -> Any:
        if method is ReplicaApi.measure:
            _, chunk, plan, _ = args
            self.asked.append((plan == Plan.nothing(), chunk.id))
            self.began.release()
            assert self.gate.acquire(timeout=20)
            if self.broken:
                raise ScoreError("as told to")
        return super().call(method, *args)


class RecordingProgress(SilentProgress):
    """Records the findings that are reported to it."""

    def __init__(self) -> None:
        self.found: list[tuple[str, bool, float]] = []
        self.reported = threading.Semaphore(0)

    def finding(self, model: str, suite: str, found: Finding, ended: bool) -> None:
        assert found.score is not None
        self.found.append((model, ended, found.score.value))
        self.reported.release()


@pytest.fixture
def made(planted_run: Any, tmp_path: Path) -> Iterator[Any]:
    """A validation of the planted run, its pool, its display, and its events."""
    directory = planted_run.directory
    rows = [{"prompt": f"tell me about the old {word}", "label": "safe"} for word in FLAGGED[:4]]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = directory.read_recipe().model_dump(mode="json") | {"suites": [SUITE]}
    recipe["evaluation"] = {"replicas": 1}
    file = directory.path / "recipe.resolved.json"
    before = file.read_text()
    file.write_text(json.dumps(recipe))
    pool, display, events = (
        Gated(Replica(directory.read_recipe(), str(planted_run.model), {})),
        RecordingProgress(),
        [],
    )
    setup = TrialSetup(directory.directions(), (), directory.tuning())

    @contextmanager
    def start(go_on: Callable[[], bool]) -> Iterator[Any]:
        yield pool

    def notify(event: str, **details: Any) -> None:
        events.append((event, details))

    context = run_context(directory, pool, progress=display, base=tmp_path)
    context.record.notify = notify  # type: ignore[method-assign]
    yield Validation(context, start, pool.put(setup)), pool, display, events
    file.write_text(before)
    shutil.rmtree(directory.path / "evaluations", ignore_errors=True)


def member(trial: Trial, number: int) -> Trial:
    return replace(trial, number=number)


def frontier(*trials: Trial) -> Frontier:
    return Frontier.of(trials)


def wait_for_findings(progress: RecordingProgress, count: int) -> None:
    for _ in range(count):
        assert progress.reported.acquire(timeout=20)


def test_the_base_model_is_measured_first_then_members_as_they_come(
    made: Any, planted_run: Any
) -> None:
    validation, pool, progress, events = made
    with validation:
        pool.gate.release(2)
        wait_for_findings(progress, 1)
        validation.update(frontier(planted_run.trial))
        pool.gate.release(2)
        wait_for_findings(progress, 1)
    assert progress.found == [(BASE, True, 1.0), ("trial-0", True, 0.0)]
    assert [base for base, _ in pool.asked] == [True, True, False, False]
    assert events == []


def test_a_member_that_left_the_frontier_is_measured_no_further(
    made: Any, planted_run: Any
) -> None:
    validation, pool, progress, events = made
    validation.update(frontier(member(planted_run.trial, 7)))
    with validation:
        pool.gate.release(2)
        wait_for_findings(progress, 1)
        for _ in range(3):
            assert pool.began.acquire(timeout=20)  # the first chunk of trial 7 is being measured
        validation.update(frontier(member(planted_run.trial, 8)))
        pool.gate.release(3)
        wait_for_findings(progress, 1)
    assert [name for name, _, _ in progress.found] == [BASE, "trial-8"]
    assert events == [("validation-cancelled", {"model": "trial-7"})]
    kept = planted_run.directory.suite_results(validation._settings)
    assert [len(kept.of(f"trial-{n}", "asked").chunks) for n in (7, 8)] == [1, 2]


def test_what_cannot_be_measured_is_reported_and_the_others_are_measured(
    made: Any, planted_run: Any
) -> None:
    validation, pool, progress, events = made
    pool.broken = True
    with validation:
        pool.gate.release(1)
        assert pool.began.acquire(timeout=20)
        while not events:
            threading.Event().wait(0.01)
        pool.broken = False
        validation.update(frontier(planted_run.trial))
        pool.gate.release(2)
        wait_for_findings(progress, 1)
    assert events == [("validation-failed", {"model": BASE, "reason": "as told to"})]
    assert progress.found[-1][:2] == ("trial-0", True)


def test_the_end_does_not_wait_for_what_is_left(made: Any, planted_run: Any) -> None:
    validation, pool, progress, events = made
    validation.update(frontier(planted_run.trial))
    with validation:
        assert pool.began.acquire(timeout=20)
        threading.Timer(0.3, pool.gate.release).start()
    assert len(pool.asked) == 1 and progress.found == [] and events == []


def test_a_pool_that_cannot_start_is_reported(made: Any) -> None:
    validation, _, _, events = made

    def start(go_on: Callable[[], bool]) -> Any:
        raise ModelError("there is no room\nfor them")

    validation._start = start
    with validation:
        validation._thread.join(10)
    assert events == [("validation-stopped", {"reason": "there is no room"})]


def test_findings_stand_beside_the_frontier_as_it_grows(planted_run: Any, made: Any) -> None:
    validation, pool, progress, _ = made
    with validation:
        pool.gate.release(2)
        wait_for_findings(progress, 1)
    found = validation._results.finding(BASE, validation._suites[0])
    for kind in (LineDisplay, LiveDisplay):
        output = Console(width=160, record=True, quiet=False)
        with kind(output) as shown:
            shown.trial(planted_run.trial, 1, 2, frontier(planted_run.trial))
            shown.finding("trial-0", "asked", found, True)
            if kind is LiveDisplay:
                output.print(shown._panel())
        assert "asked" in output.export_text()
