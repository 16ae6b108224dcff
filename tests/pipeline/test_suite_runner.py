"""Suites on a run's models: results are stored as they come, continued, and never mixed."""

import json
from pathlib import Path
from typing import Any

import pytest

from ray_abliterate.cli.tables import suites_table
from ray_abliterate.errors import RecipeError, RunDirectoryError, ScoreError
from ray_abliterate.evaluation.suites.build import build_suites
from ray_abliterate.pipeline.progress import SilentProgress
from ray_abliterate.pipeline.suite_results import BASE, SuiteResults, label
from ray_abliterate.pipeline.suite_runner import (
    MeasuredModel,
    SuiteRunner,
    chosen_suites,
    measure_trials,
)
from ray_abliterate.recipe import SuiteFile, SuiteSettings
from ray_abliterate.replica.messages import ReplicaApi, TrialSetup
from ray_abliterate.replica.replica import Replica
from ray_abliterate.report.report import build_report
from ray_abliterate.search.plan import Plan
from tests.support.finished_runs import FLAGGED, THINGS, InProcessPool
from tests.support.run_contexts import run_context

SUITES = """
[[suites]]
kind = "over-refusal"
name = "asked"
table = { file = "asked.jsonl" }
markers = ["sorry"]
max_new_tokens = 3
chunk = 2

[[suites]]
kind = "kl"
prompts = { file = "neutral.txt" }
tokens = 2
chunk = 3
"""


class Counting(InProcessPool):
    """Counts what is measured, and may fail."""

    def __init__(self, replica: Replica) -> None:
        super().__init__(replica)
        self.measured: list[str] = []
        self.fail_at: int | None = None

    def call(self, method: Any, *args: Any) -> Any:
        if method is ReplicaApi.measure:
            if self.fail_at == len(self.measured):
                raise ScoreError("as told to")
            self.measured.append(args[1].id)
        return super().call(method, *args)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [
        {"prompt": f"tell me about the old {word}", "type": kind, "label": "safe"}
        for kind, words in (("flagged", FLAGGED[:4]), ("plain", THINGS[:4]))
        for word in words
    ]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = "".join(f"tell me about the old {word}\n" for word in THINGS[:7])
    (tmp_path / "neutral.txt").write_text(lines)
    (tmp_path / "suites.toml").write_text(SUITES)
    return tmp_path


@pytest.fixture
def settings(folder: Path) -> tuple[SuiteSettings, ...]:
    return SuiteFile.load(folder / "suites.toml")


@pytest.fixture
def pool(planted_run: Any) -> Counting:
    return Counting(Replica(planted_run.directory.read_recipe(), str(planted_run.model), {}))


@pytest.fixture
def setup(planted_run: Any) -> TrialSetup:
    directions = planted_run.directory.directions()
    return TrialSetup(directions, (), planted_run.directory.tuning())


def measured(
    pool: Counting, folder: Path, settings: Any, setup: TrialSetup, plan: Plan, trial: int | None
) -> dict[str, Any]:
    kept = SuiteResults(folder / "kept", settings)
    suites = build_suites(settings, folder)
    runner = SuiteRunner(pool, pool.put(setup), kept, SilentProgress())
    return runner.measure(MeasuredModel(label(trial), plan), suites, settings)


def test_base_model_and_trial_are_measured_and_compared(
    pool: Counting, folder: Path, settings: Any, setup: TrialSetup, planted_run: Any
) -> None:
    plan = planted_run.trial.plan
    base = measured(pool, folder, settings, setup, Plan.nothing(), None)
    trial = measured(pool, folder, settings, setup, plan, 0)
    asked, kl = build_suites(settings, folder)
    assert all(progress.whole for progress in (*base.values(), *trial.values()))
    refused = [asked.summary(found["asked"].chunks)[0].value for found in (base, trial)]
    assert refused == [0.5, 0.0]  # what is planted: flagged things only, and nothing after it
    assert kl.summary(base["kl"].chunks)[0].value == 0.0
    assert kl.summary(trial["kl"].chunks)[0].value > 0.0
    (difference,) = asked.compare(base["asked"].chunks, trial["asked"].chunks)
    assert difference.difference == -0.5 and difference.items == 8
    kept = SuiteResults(folder / "kept", settings)
    assert kept.labels == (BASE, "trial-0")
    text = "".join(
        str(c) for column in suites_table(kept, (asked, kl)).columns for c in column.cells
    )
    assert "0.5 [0.215, 0.785]" in text and "-0.5 [" in text and "*" not in text


def test_what_is_known_is_not_measured_again_and_a_stopped_suite_goes_on(
    pool: Counting, folder: Path, settings: Any, setup: TrialSetup
) -> None:
    pool.fail_at = 3
    with pytest.raises(ScoreError, match="as told to"):
        measured(pool, folder, settings, setup, Plan.nothing(), None)
    kept = SuiteResults(folder / "kept", settings)
    assert len(kept.of(BASE, "asked").chunks) == 3 and not kept.of(BASE, "asked").whole
    file = next((folder / "kept" / BASE).glob("asked-*.jsonl"))
    with file.open("ab") as stream:
        stream.write(b'{"suite": "asked", "chu')  # its writer was killed
    pool.fail_at = None
    found = measured(pool, folder, settings, setup, Plan.nothing(), None)
    assert len(pool.measured) == len(set(pool.measured)) == 4 + 3
    assert found["asked"].whole and len(found["asked"].chunks) == 4
    measured(pool, folder, settings, setup, Plan.nothing(), None)
    assert len(pool.measured) == 7


def test_other_settings_and_other_items_are_measured_anew(
    pool: Counting, folder: Path, settings: Any, setup: TrialSetup
) -> None:
    measured(pool, folder, settings[:1], setup, Plan.nothing(), None)
    longer = (settings[0].model_copy(update={"max_new_tokens": 2}),)
    measured(pool, folder, longer, setup, Plan.nothing(), None)
    assert len(pool.measured) == 8
    file = folder / "asked.jsonl"
    lines = file.read_text().splitlines()
    lines[0] = lines[0].replace("old", "new")
    file.write_text("\n".join(lines) + "\n")
    kept = SuiteResults(folder / "kept", settings[:1])
    whole = next((folder / "kept" / BASE).glob("asked-*.jsonl"))
    assert kept.of(BASE, "asked").whole
    for name in (folder / "kept" / BASE).glob("asked-*.jsonl"):
        text = name.read_text().splitlines()
        name.write_text("\n".join(text[:-1]) + "\n")  # as if it had not been whole
    assert whole.exists()
    measured(pool, folder, settings[:1], setup, Plan.nothing(), None)
    assert len(pool.measured) == 9


def test_a_suite_ends_once_its_interval_settles_the_limit(
    pool: Counting, folder: Path, settings: Any, setup: TrialSetup
) -> None:
    limit = (settings[0].model_copy(update={"at_most": 0.05, "chunk": 4}),)
    found = measured(pool, folder, limit, setup, Plan.nothing(), None)
    assert len(pool.measured) == 1  # 4 of 4 flagged prompts are refused
    assert not found["asked"].whole
    measured(pool, folder, limit, setup, Plan.nothing(), None)
    assert len(pool.measured) == 1
    open_question = (settings[0].model_copy(update={"at_most": 0.6, "chunk": 8}),)
    assert measured(pool, folder, open_question, setup, Plan.nothing(), None)["asked"].whole


def test_a_damaged_line_is_named(folder: Path, settings: Any) -> None:
    kept = SuiteResults(folder / "kept", settings)
    file = kept._file(BASE, "kl")
    file.parent.mkdir(parents=True)
    file.write_text('{"suite"\n{"wanted": 3}\n')
    with pytest.raises(RunDirectoryError, match="line 1 is damaged"):
        kept.of(BASE, "kl")


def test_suites_of_a_run_are_in_its_directory(
    pool: Counting,
    folder: Path,
    settings: Any,
    setup: TrialSetup,
    planted_run: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    directory = planted_run.directory
    context = run_context(directory, pool)
    measure_trials(context, [planted_run.trial], settings, folder, pool.put(setup))
    kept = directory.suite_results(settings)
    assert kept.labels == (BASE, "trial-0")
    assert all(kept.of(model, suite).whole for model in kept.labels for suite in kept.suites)
    monkeypatch.setattr(type(directory), "read_base", lambda self: folder)
    page = build_report(directory)
    table = page[page.index('id="suites"') : page.index('id="separation"')]
    assert '<th scope="col">asked</th><th scope="col">kl</th>' in table
    assert "0.5 [0.215, 0.785]" in table and "-0.5 [" in table


def test_suites_that_are_not_there_are_named(settings: Any) -> None:
    assert [s.name for s in chosen_suites(settings, ["kl"])] == ["kl"]
    with pytest.raises(RecipeError, match=r"no suite 'mmlu'; there are asked, kl"):
        chosen_suites(settings, ["mmlu"])
    with pytest.raises(RecipeError, match="--suites FILE"):
        chosen_suites((), [])
