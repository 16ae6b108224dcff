"""The run directory: what it refuses, and what survives a crash."""

import dataclasses
import os
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from ray_abliterate.directions.directions import Directions
from ray_abliterate.directions.residuals.shard import ResidualShard
from ray_abliterate.directions.residuals.shard_files import ShardFiles
from ray_abliterate.errors import (
    RecipeChanged,
    RunDirectoryError,
    RunExists,
    RunNotFound,
    TrialNotFound,
)
from ray_abliterate.pipeline.directory import Baseline, RunDirectory
from ray_abliterate.recipe import Recipe
from ray_abliterate.search.frontier import Trial
from ray_abliterate.search.plan import Plan, Profile
from ray_abliterate.search.score import Score, Scorecard

TEXT = """
# As the user wrote it.
model.name = "planted"
prompts.behaviour.file = "a.txt"
prompts.neutral.file = "b.txt"
search.trials = 20
[[scorers]]
kind = "kl-divergence"
prompts = { file = "c.txt" }
"""
PLAN = Plan("global", 1.5, "row", (("mlp", Profile(1.0, 2.0, 0.5, 1.0)),))
CARD = Scorecard((Score("kl-divergence", 0.25, 0.125, 0.5, detail={"tokens": 7}),))


def recipe(*overrides: str) -> Recipe:
    return Recipe.parse(TEXT, "recipe.toml", overrides)


def finished(number: int, value: float = 0.25) -> Trial:
    return Trial(number, PLAN, Scorecard((Score("kl-divergence", value, value, value),)), 1.5)


def failed(number: int, error: str = "out of memory") -> Trial:
    return Trial(number, PLAN, None, 0.5, error)


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    return RunDirectory.create(tmp_path / "run", recipe(), TEXT)


def hidden_files(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(".*") if path.name != ".lock"]


# Creating and opening


def test_a_run_keeps_the_recipe_as_given_and_as_resolved(run):
    assert (run.path / "recipe.toml").read_text() == TEXT
    assert run.read_recipe() == recipe()
    assert RunDirectory.open(run.path) == run


def test_a_run_is_created_in_an_empty_folder_or_a_new_one(tmp_path):
    RunDirectory.create(tmp_path, recipe(), TEXT)
    RunDirectory.create(tmp_path / "a" / "b", recipe(), TEXT)


def test_a_folder_with_a_run_is_refused_with_the_way_to_go_on(run):
    run.append_trial(finished(0))
    with pytest.raises(RunExists, match=rf"holds 1 of 20 trials(?s:.*)resume {run.path}"):
        RunDirectory.create(run.path, recipe(), TEXT)
    assert len(run.trials()) == 1


def test_a_run_that_never_had_a_model_gives_way_to_another_recipe(run):
    """Whose prompts or model were not there: the recipe is mended, and run again."""
    run.record_facts(prompts={"behaviour": {}})
    run.append_event({"event": "replica-failed-to-start"})
    with run.locked():
        pass
    mended = recipe("model.name=another/model")
    assert RunDirectory.create(run.path, mended, "mended").read_recipe() == mended
    assert (run.path / "recipe.toml").read_text() == "mended"
    assert run.read_environment() == {} and run.events() == ()


@pytest.mark.parametrize("kept", ["model", "imported", "in use"])
def test_a_run_that_has_something_gives_way_to_none(run, kept):
    with ExitStack() as held:
        if kept == "model":
            run.record_facts(model={"name": "m"})
        elif kept == "imported":
            run.save_imported_study({})
        else:
            held.enter_context(run.locked())
        with pytest.raises(RunDirectoryError, match=r"already holds 0 of 20|in use"):
            RunDirectory.create(run.path, recipe(), "another")
    assert (run.path / "recipe.toml").read_text() == TEXT


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunExists, match="not empty"):
        RunDirectory.create(tmp_path, recipe(), TEXT)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(RunDirectoryError, match="cannot be written"):
        RunDirectory.create(tmp_path / "run", recipe(), TEXT)


def test_a_missing_run_is_refused_with_the_runs_beside_it(run, tmp_path):
    with pytest.raises(RunNotFound, match=r"Runs in the same folder: .*run"):
        RunDirectory.open(tmp_path / "other")
    with pytest.raises(RunNotFound, match="holds no run"):
        RunDirectory.open(tmp_path / "deep" / "other")


def test_a_damaged_recipe_is_refused(run):
    (run.path / "recipe.resolved.json").write_text('{"model": ')
    with pytest.raises(RunDirectoryError, match="damaged"):
        _ = run.read_recipe()


# Trials


def test_trials_come_back_as_they_were_in_order_of_number(run):
    trials = [finished(2), failed(0), finished(1)]
    for trial in trials:
        run.append_trial(trial)
    assert run.trials() == (trials[1], trials[2], trials[0])


def test_a_bounded_trial_comes_back_as_it_was(run):
    score = Score("kl-divergence", 0.25, 0.25, 1.0, detail={"hits": 3}, bound=True)
    trial = Trial(0, PLAN, Scorecard((score,)), 1.5)
    run.append_trial(trial)
    assert run.trials() == (trial,) and run.trial(0).pruned


def test_a_run_without_trials_has_none(run):
    assert run.trials() == ()


@pytest.mark.parametrize("kept", [1, 5, 60, -1])
def test_a_torn_last_line_is_skipped_and_the_next_trial_gets_a_line_of_its_own(run, kept, caplog):
    run.append_trial(finished(0))
    torn = failed(1, "Käse").to_json().encode()
    with (run.path / "trials.jsonl").open("ab") as file:
        file.write(torn[:kept])
    assert run.trials() == (finished(0),)
    assert "torn" in caplog.text
    run.append_trial(finished(2))
    assert run.trials() == (finished(0), finished(2))


def test_a_line_torn_inside_a_letter_is_skipped(run):
    run.append_trial(finished(0))
    torn = failed(1, "Käse").to_json().encode()
    with (run.path / "trials.jsonl").open("ab") as file:
        file.write(torn[: torn.index("ä".encode()) + 1])
    assert run.trials() == (finished(0),)


def test_a_whole_last_line_without_its_line_end_counts(run):
    (run.path / "trials.jsonl").write_text(finished(0).to_json())
    run.append_trial(finished(1))
    assert run.trials() == (finished(0), finished(1))


def test_a_repeated_number_counts_once(run):
    run.append_trial(finished(0))
    run.append_trial(failed(1))
    run.append_trial(finished(1, 0.5))
    assert run.trials() == (finished(0), finished(1, 0.5))


@pytest.mark.parametrize("mark", ["\n", "\r", "\u2028", "\u2029", "\x85", "\x0c"])
def test_an_error_text_with_any_kind_of_line_end_is_one_trial(run, mark):
    run.append_trial(failed(0, f"first{mark}second"))
    run.append_trial(finished(1))
    assert run.trials() == (failed(0, f"first{mark}second"), finished(1))


def test_one_trial_is_found_by_its_number(run):
    run.append_trial(finished(0))
    assert run.trial(0) == finished(0)


def test_a_trial_that_is_not_there_or_failed_is_refused(run):
    with pytest.raises(TrialNotFound, match=r"no trial 0 \(it has none yet\)"):
        run.trial(0)
    run.append_trial(finished(0, 0.5))
    run.append_trial(finished(3, 0.25))
    run.append_trial(failed(4))
    with pytest.raises(TrialNotFound, match=r"no trial 7 \(it has 0 to 4\)(?s:.*)frontier: 3"):
        run.trial(7)
    with pytest.raises(TrialNotFound, match="trial 4 failed: out of memory"):
        run.trial(4)


# The recipe of a run


def test_another_number_of_trials_is_no_change(run):
    run.refuse_changed(recipe("search.trials=500"))


def test_a_changed_recipe_is_refused_with_the_difference(run):
    with pytest.raises(RecipeChanged) as caught:
        run.refuse_changed(recipe("search.trials=500", "edit.norm=column"))
    changes = [line for line in str(caught.value).splitlines() if line.startswith(("  -", "  +"))]
    assert [change.split() for change in changes] == [
        ["-", '"norm":', '"row"'],
        ["+", '"norm":', '"column"'],
    ]


def test_extending_a_run_changes_its_number_of_trials_alone(run):
    run.extend(50)
    assert run.read_recipe() == recipe("search.trials=50")


# One driver at a time


def test_a_run_in_use_is_refused_to_a_second_driver(run):
    with (
        run.locked(),
        pytest.raises(RunDirectoryError, match="in use"),
        RunDirectory.open(run.path).locked(),
    ):
        pass
    with run.locked():
        pass


def test_a_driver_that_fails_lets_go_of_the_run(run):
    with pytest.raises(KeyError) as kept, run.locked():
        raise KeyError("anything")
    with run.locked():
        assert kept.value  # The traceback still holds the frames of the failed driver.


# Whole files


def test_a_write_that_fails_leaves_the_old_file_and_no_temporary_one(run, monkeypatch):
    run.record_facts(device="cpu")

    def broken(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", broken)
        with pytest.raises(OSError, match="No space"):
            run.record_facts(device="cuda")
    assert run.read_environment() == {"device": "cpu"}
    assert hidden_files(run.path) == []


def test_facts_add_up(run):
    assert run.read_environment() == {}
    run.record_facts(device="cpu", layers=4)
    run.record_facts(layers=5)
    assert run.read_environment() == {"device": "cpu", "layers": 5}


def test_what_is_known_before_the_search_comes_back_as_it_was(run):
    assert (run.residuals("neutral"), run.directions(), run.baseline()) == (None, None, None)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, 2, 8, generator=generator).numpy()
    files = ShardFiles(run.shards, None, print)
    files.store(ResidualShard.of("neutral", 0, values[:2]), 0, "key")
    files.store(ResidualShard.of("neutral", 2, values[2:]), 1, "key")
    run.record_facts(prompts={"neutral": {"fingerprint": "abc"}})
    again = run.residuals("neutral")
    assert again is not None
    assert torch.equal(again.values, torch.from_numpy(values))
    assert again.fingerprint == "abc"
    assert run.residuals("behaviour") is None

    vectors = torch.nn.functional.normalize(torch.randn(2, 8, generator=generator), dim=-1)
    run.save_directions(Directions(vectors, "mean-difference", {"behaviour": "abc"}))
    directions = run.directions()
    assert directions is not None
    assert torch.equal(directions.vectors, vectors)

    baseline = Baseline(CARD, ({"auroc": 0.75}, {"auroc": 1.0}), 1)
    run.save_baseline(baseline)
    assert dataclasses.asdict(run.baseline()) == dataclasses.asdict(baseline)
    assert hidden_files(run.path) == []


def test_answers_come_back_and_missing_ones_say_how_to_get_them(run):
    rows = [{"prompt": "How?", "answer": "So.\nAnd so.", "behaviour": False}]
    run.save_responses(3, rows)
    assert run.responses(3) == rows
    with pytest.raises(TrialNotFound, match="record_responses"):
        run.responses(4)


def test_a_recipes_folder_that_is_gone_is_looked_for_as_it_was_given(run, tmp_path, monkeypatch):
    assert run.read_base() == Path(".")
    (tmp_path / "job-1").mkdir()
    run.record_facts(base=str(tmp_path / "job-1"), base_given="recipes")
    assert run.read_base() == tmp_path / "job-1"
    (tmp_path / "job-1").rmdir()
    assert run.read_base() == Path("recipes")


def test_damaged_or_missing_residuals_are_an_error_that_names_the_set(run):
    values = torch.ones(2, 1, 4).numpy()
    files = ShardFiles(run.shards, None, print)
    for number in range(3):
        files.store(ResidualShard.of("neutral", 2 * number, values), number, "key")
    file = run.shards.file("neutral", 1)
    good = file.read_bytes()
    file.write_bytes(good[:-1])
    with pytest.raises(RunDirectoryError, match=r"'neutral'.*can't be read"):
        run.residuals("neutral")
    file.unlink()
    with pytest.raises(RunDirectoryError, match="each prompt once"):
        run.residuals("neutral")
