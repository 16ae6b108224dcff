"""The prompt filter on the planted model: only what contradicts its set is left out."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_abliterate.cli.app import app
from ray_abliterate.errors import PromptSourceError, RunDirectoryError, ScoreError
from ray_abliterate.export.model_card import _direction_facts
from ray_abliterate.pipeline import run
from ray_abliterate.pipeline.directory import RunDirectory
from ray_abliterate.pipeline.extraction import extract, find_directions
from ray_abliterate.pipeline.progress import SilentProgress
from ray_abliterate.pipeline.prompt_sets import load_prompts
from ray_abliterate.pipeline.replicas import record_environment
from ray_abliterate.recipe import Recipe
from ray_abliterate.replica.messages import ReplicaApi
from ray_abliterate.replica.replica import Replica
from ray_abliterate.report.report import build_report
from ray_abliterate.search.plan import Plan
from tests.conftest import MODEL_AND_PROMPTS
from tests.support.finished_runs import FLAGGED, THINGS, InProcessPool
from tests.support.run_contexts import run_context

RECIPE = (
    MODEL_AND_PROMPTS
    + """\
{filter}
[[scorers]]
kind = "kl-divergence"
prompts = {{ file = "neutral.txt", split = "[:2]" }}
[[scorers]]
kind = "keyword-rate"
prompts = {{ file = "behaviour.txt", split = "[:2]" }}
max_new_tokens = 4
[run]
batch_size = 3
residual_cache = false
"""
)
FILTER = "filter_by_behaviour = true\nleast_prompts = 4"
BEHAVIOUR = (*FLAGGED[:3], "river", *FLAGGED[3:5], "stone")
NEUTRAL = (*THINGS[:4], "cake", *THINGS[4:6])
"""At 3 and 6, and at 4, stands what belongs into the other set."""


class Answers(InProcessPool):
    """Counts batches that are answered, may fail, and may give them in another order."""

    def __init__(self, replica: Replica, backwards: bool = False) -> None:
        super().__init__(replica)
        self.answered: list[tuple[str, int]] = []
        self.backwards, self.fail_at = backwards, -1

    def map(self, method: Any, calls: Any, *rest: Any, **more: Any) -> Iterator[Any]:
        if method is not ReplicaApi.shows_behaviour:
            yield from super().map(method, calls, *rest, **more)
            return
        for args in reversed(list(calls)) if self.backwards else calls:
            if len(self.answered) == self.fail_at:
                raise ScoreError("as told to")
            self.answered.append(args[:2])
            yield self.call(method, *args)


class RecordingProgress(SilentProgress):
    """Records notes and steps."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.steps: list[tuple[int, int]] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def step(self, done: int, total: int) -> None:
        self.steps.append((done, total))


class Started:
    """A run that has come as far as its prompts."""

    def __init__(
        self, folder: Path, model: Path, setting: str = FILTER,
        behaviour: tuple[str, ...] = BEHAVIOUR, neutral: tuple[str, ...] = NEUTRAL,
    ) -> None:  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        for name, words in (("behaviour", behaviour), ("neutral", neutral)):
            lines = "".join(f"tell me about the old {word}\n" for word in words)
            (folder / f"{name}.txt").write_text(lines)
        self.base, self.progress = folder, RecordingProgress()
        text = RECIPE.format(model=model, filter=setting)
        self.recipe = Recipe.parse(text, "recipe.toml")
        self.directory = RunDirectory.create(folder / "run", self.recipe, text)
        self.sets = load_prompts(self.recipe, self.directory, folder, self.progress)
        self.pool = Answers(Replica(self.recipe, str(model), self.sets.scored))
        self.context = run_context(self.directory, self.pool, self.recipe, self.progress, folder)
        record_environment(self.context)

    def found(self) -> Any:
        setup, shards = find_directions(self.context, self.sets)
        run.measure_baseline(self.context, setup, self.pool.put(setup), shards)
        return setup.directions

    def key(self, name: str) -> str:
        return self.directory.read_environment()["residuals"][name]["key"]


@pytest.fixture(scope="module")
def filtered(tmp_path_factory, planted_folder) -> Started:
    started = Started(tmp_path_factory.mktemp("filtered"), planted_folder)
    started.found()
    return started


def test_directions_are_those_of_sets_without_what_contradicts_them(
    filtered: Started, planted_folder: Path, tmp_path: Path
) -> None:
    clean = Started(tmp_path / "clean", planted_folder, "", (*FLAGGED[:5],), (*THINGS[:6],))
    mixed = Started(tmp_path / "mixed", planted_folder, "")
    found = filtered.directory.directions()
    assert torch.equal(found.vectors, clean.found().vectors)
    assert found.origin == clean.directory.directions().origin
    assert not torch.equal(found.vectors, mixed.found().vectors)
    for name in ("behaviour", "neutral"):
        assert filtered.key(name) == clean.key(name) != mixed.key(name)
    assert not clean.pool.answered and "filtered" not in mixed.directory.read_environment()
    assert filtered.directory.residuals("neutral").fingerprint == clean.sets.neutral.fingerprint


def test_it_is_said_how_many_and_which_were_left_out(
    filtered: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = filtered.directory.read_environment()["filtered"]
    assert facts["test"] == "keyword-rate"
    one, other = facts["behaviour"], facts["neutral"]
    assert (one["prompts"], one["kept"], one["left_out"]) == (7, 5, [3, 6])
    assert (other["prompts"], other["kept"], other["left_out"]) == (7, 6, [4])
    assert (one["contradicting"], one["unclear"]) == (2, 0)
    said = [
        "prompts.behaviour: 2 of 7 prompts are left out: 2 whose base-model answer does not "
        "show the behaviour (scorer 'keyword-rate'). Which ones: environment.json, filtered",
        "prompts.neutral: 1 of 7 prompts are left out: 1 whose base-model answer shows the "
        "behaviour (scorer 'keyword-rate'). Which ones: environment.json, filtered",
    ]
    assert [note for note in filtered.progress.notes if "left out" in note] == [
        f"warning: {line}" for line in said
    ]
    warnings = filtered.directory.read_environment()["warnings"]
    assert [line for line in warnings if "left out" in line] == said
    page = build_report(filtered.directory)
    assert "2 of 7 prompts are left out" in page[page.index('id="warnings"') :]
    assert filtered.progress.steps[:1] == [(0, 6)] and (6, 6) in filtered.progress.steps
    sets = _direction_facts(filtered.directory, Plan.nothing())["sets"]
    assert [one["prompts"] for one in sets] == [5, 6]
    assert sets[0]["fingerprint"] == one["fingerprint"][:16]


def test_show_and_directions_say_so_too(filtered: Started, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    path = str(filtered.directory.path)
    compare = ["--method", "mean-difference", "--pairs", "2", "--to", str(tmp_path)]
    for arguments in (["show", path], ["directions", path, *compare]):
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, done.output
        assert "2 of 7 prompts are left out" in " ".join(done.output.split())


def test_a_run_that_was_stopped_asks_only_for_batches_that_are_missing(
    filtered: Started, planted_folder: Path, tmp_path: Path
) -> None:
    started = Started(tmp_path, planted_folder)
    started.pool.fail_at = 4
    with pytest.raises(ScoreError, match="as told to"):
        started.found()
    file = started.directory.path / "verdicts.jsonl"
    with file.open("ab") as stream:
        stream.write(b'{"set": "neutral", "fir')  # its writer was killed
    started.pool.fail_at = -1
    assert torch.equal(started.found().vectors, filtered.directory.directions().vectors)
    places = [(name, first) for name in ("behaviour", "neutral") for first in (0, 3, 6)]
    assert started.pool.answered == places
    started.found()
    assert started.pool.answered == places


def test_batches_may_end_in_any_order(
    filtered: Started, planted_folder: Path, tmp_path: Path
) -> None:
    started = Started(tmp_path, planted_folder)
    started.pool.backwards = True
    assert torch.equal(started.found().vectors, filtered.directory.directions().vectors)
    ours, theirs = (one.directory.read_environment()["filtered"] for one in (started, filtered))
    assert ours == theirs


def test_verdicts_of_another_test_are_not_taken(planted_folder: Path, tmp_path: Path) -> None:
    started = Started(tmp_path, planted_folder)
    started.found()
    before = len(started.pool.answered)
    (kl, rate) = started.recipe.scorers
    other = rate.model_copy(update={"markers": ("sure",)})
    recipe = started.recipe.model_copy(update={"scorers": (kl, other)})
    started.context = replace(started.context, recipe=recipe)
    started.pool.replica = Replica(recipe, str(planted_folder), started.sets.scored)
    (started.directory.path / "baseline.json").unlink()
    with pytest.raises(PromptSourceError, match=r"prompts.behaviour: 5 of 7 .*; 2 are left"):
        started.found()
    assert len(started.pool.answered) == 2 * before


@pytest.mark.parametrize(
    ("behaviour", "neutral", "least", "said"),
    [
        (THINGS[:4], THINGS[4:8], 1, r"prompts.behaviour: 4 of 4 .*; none is left, and "
         r"prompts.least_prompts is 1.\n  Give prompts that the model shows the behaviour on"),
        (FLAGGED[:5], (*FLAGGED[:2], *THINGS[:3]), 4,
         r"prompts.neutral: 2 of 5 .*; 3 are left[\s\S]*filter_by_behaviour = false"),
    ],
)  # fmt: skip
def test_a_set_that_is_left_with_too_few_ends_the_run_with_numbers_and_what_to_do(
    behaviour: tuple[str, ...], neutral: tuple[str, ...], least: int, said: str,
    planted_folder: Path, tmp_path: Path,
) -> None:  # fmt: skip
    setting = f"filter_by_behaviour = true\nleast_prompts = {least}"
    started = Started(tmp_path, planted_folder, setting, behaviour, neutral)
    with pytest.raises(PromptSourceError, match=said):
        started.found()
    assert started.directory.directions() is None


def test_sets_that_are_too_small_to_begin_with_are_refused_before_a_model_is_loaded(
    tmp_path: Path,
) -> None:
    setting = "filter_by_behaviour = true\nleast_prompts = 6"
    with pytest.raises(PromptSourceError, match=r"prompts.behaviour has 5 prompts, .* = 6 have"):
        Started(tmp_path, Path("no-model"), setting, FLAGGED[:5], THINGS[:6])


def test_answers_that_say_nothing_leave_both_sets_and_are_counted_apart(
    planted_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = Started(tmp_path, planted_folder)
    model = type(started.pool.replica.model)
    answer = model.answer

    def silent(self: Any, prompts: Any, *rest: Any) -> Any:
        found = answer(self, prompts, *rest)
        return [
            replace(one, text="") if prompt.user.endswith((FLAGGED[0], THINGS[0])) else one
            for prompt, one in zip(prompts, found, strict=True)
        ]

    monkeypatch.setattr(model, "answer", silent)
    started.found()
    facts = started.directory.read_environment()["filtered"]
    behaviour = facts["behaviour"]
    # the river is among the behaviour's too, where it contradicts its set
    assert (behaviour["left_out"], behaviour["unclear"]) == ([0, 3, 6], 2)
    assert (facts["neutral"]["left_out"], facts["neutral"]["unclear"]) == ([0, 4], 2)
    (line, _) = [text for text in started.progress.notes if "left out" in text]
    assert "1 whose base-model answer does not show" in line
    assert "2 whose answer is empty, degenerate or unclear" in line


def test_sets_that_agree_are_noted_without_a_warning(planted_folder: Path, tmp_path: Path) -> None:
    started = Started(tmp_path, planted_folder, FILTER, FLAGGED[:5], THINGS[:5])
    started.found()
    (one, other) = [note for note in started.progress.notes if "base model's answers" in note]
    assert one == (
        "prompts.behaviour: all 5 prompts agree with the base model's answers "
        "(scorer 'keyword-rate')"
    )
    assert "warning" not in other


def test_residuals_that_another_scorer_chose_are_not_another_recipes(
    filtered: Started, tmp_path: Path
) -> None:
    folder = filtered.directory.path
    assert extract(filtered.recipe, "", tmp_path, folder, SilentProgress()).path == folder
    (kl, rate) = filtered.recipe.scorers
    other = rate.model_copy(update={"max_new_tokens": 2})
    changed = filtered.recipe.model_copy(update={"scorers": (kl, other)})
    with pytest.raises(RunDirectoryError, match="not the one"):
        extract(changed, "", tmp_path, folder, SilentProgress())


def test_what_is_kept_of_answers_holds_no_text(filtered: Started) -> None:
    lines = (filtered.directory.path / "verdicts.jsonl").read_text().splitlines()
    assert len(lines) == 6
    for line in lines:
        assert set(json.loads(line)) == {"set", "first", "key", "shows"}
        assert "river" not in line and "sorry" not in line
