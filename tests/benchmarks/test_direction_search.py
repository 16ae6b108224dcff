"""The comparison of direction methods: its arithmetic, its planted models, and going on."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.direction_search import __main__ as direction_search
from benchmarks.direction_search.hypervolumes import (
    Job,
    Outcome,
    against,
    append,
    by_budget,
    by_method,
    key_of,
    read,
    spread,
)
from benchmarks.direction_search.models import METHODS, OUTLYING, SUBJECTS, Bench, draw, prompts
from benchmarks.harness import tables
from ray_abliterate.data.builtin.planted_model import MASSIVE_UNIT, planted_axes
from ray_abliterate.recipe import METHOD_NAMES

REFERENCES = {"clean": (1.0, 0.5)}


def outcome(method: str, seed: int, *found: Any, seed_points: bool = True) -> Outcome:
    """What a search with these rates and divergences found."""
    return Outcome(Job("clean", method, seed, len(found), seed_points, "k"), found, 3, 0.9, 1.0)


def test_a_volume_is_the_share_of_the_rectangle_that_plans_cover() -> None:
    found = outcome("whitened", 0, (0.5, 0.1), (0.0, 0.4), (0.6, 0.2), (0.0, 0.6), (1.0, 0.0))
    # 0.5 x 0.4 left of the first, 0.5 x 0.1 below it: the rest is dominated or beyond the reference
    assert found.volume((1.0, 0.5)) == pytest.approx(100 * (0.5 * 0.4 + 0.5 * 0.1) / 0.5)


def test_a_volume_is_of_the_first_plans_and_failed_ones_are_none() -> None:
    found = outcome("whitened", 0, (0.5, 0.25), None, (0.0, 0.0))
    assert found.volume((1.0, 0.5), 2) == pytest.approx(25.0)
    assert found.volume((1.0, 0.5)) == pytest.approx(100.0)
    assert outcome("whitened", 0, None).volume((1.0, 0.5)) == 0.0


def test_differences_are_taken_at_the_same_seed() -> None:
    assert against({0: 10.0, 1: 20.0, 2: 5.0}, {2: 5.0, 1: 15.0, 0: 12.0, 3: 99.0}) == {
        "min": -2.0,
        "median": 0.0,
        "max": 5.0,
        "more": 1,
        "less": 1,
        "seeds": 3,
    }
    assert against({0: 1.0}, {1: 1.0}) == {}


def test_methods_are_summed_up_over_seeds() -> None:
    rows = by_method(
        [
            outcome("mean-difference", 0, (0.5, 0.25)),
            outcome("mean-difference", 1, (0.0, 0.25)),
            outcome("whitened", 1, (0.0, 0.0)),
            outcome("whitened", 0, (0.5, 0.0)),
            Outcome(Job("demo", "whitened", 0, 1, True, "k"), ((0.5, 0.0),), 3, None, 1.0),
        ],
        REFERENCES | {"demo": (1.0, 0.5)},
    )
    assert [row["method"] for row in rows] == ["mean-difference", "whitened", "whitened"]
    assert [row["cosine"] for row in rows] == [0.9, 0.9, None]
    assert rows[0]["volume"] == spread([25.0, 50.0])
    assert rows[1]["volume"] == {"min": 50.0, "median": 75.0, "max": 100.0}
    assert rows[1]["against"]["median"] == 37.5
    assert rows[1]["against"]["more"] == 2


def test_seed_points_are_judged_after_each_budget() -> None:
    rows = by_budget(
        [
            outcome("mean-difference", 0, (0.0, 0.25), (0.0, 0.25)),
            outcome("mean-difference", 0, (0.5, 0.25), (0.0, 0.0), seed_points=False),
        ],
        REFERENCES,
        (1, 2),
    )
    assert [(row["budget"], row["against"]["median"]) for row in rows] == [(1, 25.0), (2, -50.0)]


def test_searches_are_read_back_and_a_torn_line_is_left_out(tmp_path: Path) -> None:
    file, kept = tmp_path / "searches.jsonl", outcome("whitened", 0, (0.5, 0.25), None)
    assert read(file) == {}
    append(file, kept)
    file.write_text(file.read_text() + kept.to_json()[:40])
    assert read(file) == {kept.job: kept}
    append(file, other := outcome("whitened", 1, (0.0, 0.0)))
    assert read(file) == {kept.job: kept, other.job: other}


def test_results_of_another_model_or_method_do_not_count() -> None:
    keys = {key_of(subject, METHODS["leace"]) for subject in SUBJECTS.values()}
    assert len(keys) == len(SUBJECTS)
    assert key_of(SUBJECTS["demo"], METHODS["inlp"]) not in keys


def test_every_method_is_compared() -> None:
    assert {settings["method"] for settings in METHODS.values()} == {*METHOD_NAMES, "ensemble"}


def test_a_seed_draws_the_same_prompts_for_all_methods_and_others_than_the_next() -> None:
    assert draw(128, 32, 1) == draw(128, 32, 1) != draw(128, 32, 2)
    assert len(set(draw(128, 32, 1))) == 32


@pytest.mark.parametrize("name", SUBJECTS)
def test_no_prompt_is_scored_that_directions_come_from(name: str) -> None:
    sets = dict(prompts(SUBJECTS[name]))
    for scored in ("keyword-rate", "kl-divergence"):
        for source in ("behaviour", "neutral"):
            assert not sets[source].overlap(sets[scored])


@pytest.fixture(scope="module", params=["clean", "outliers", "entangled"])
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A planted model, loaded."""
    return Bench(request.param, tmp_path_factory.mktemp("models"))


def test_the_planted_models_show_the_behaviour_and_a_search_takes_it_out(bench: Bench) -> None:
    rate, divergence = bench.base()
    assert rate > 0.9 and divergence == 0.0
    found = bench.run(Job(bench.name, "geometric-median", 0, 12, True, ""))
    assert len(found.found) == 12
    assert min(losses[0] for losses in found.found if losses is not None) < 0.6
    assert found.cosine is not None and found.cosine > 0.8


def test_a_trait_shows_in_the_residuals_and_in_the_answers(bench: Bench) -> None:
    layer, along = SUBJECTS[bench.name].traits.planted_layers[-1], planted_axes()[0].numpy()
    residuals = {name: values[:, layer] for name, values in bench._residuals.items()}
    gap = residuals["behaviour"].mean(0) - residuals["neutral"].mean(0)
    assert gap @ along > 0
    spikes = [int((abs(v[:, MASSIVE_UNIT]) > 20).sum()) for v in residuals.values()]
    assert spikes == ([4, 0] if bench.name == "outliers" else [0, 0])
    answers = bench._replica.model.answer(bench._sets["kl-divergence"].prompts, 1)
    asked = ["how" in p.user.lower().split() for p in bench._sets["kl-divergence"].prompts]
    said = [answer.text.strip() == "indeed" for answer in answers]
    if bench.name == "entangled":
        assert sum(a == b for a, b in zip(said, asked, strict=True)) > 0.9 * len(said)
    else:
        assert not any(said)


def test_a_comparison_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept: list[dict[str, Any]] = []
    monkeypatch.setattr(direction_search, "save", lambda name, figures, file: kept.append(figures))
    methods = ["mean-difference", "whitened"]
    command = ["x", "--models", "clean", "--trials", "3", "--seeds", "2", "--part", "methods"]
    monkeypatch.setattr(sys, "argv", [*command, "--methods", *methods, "--work", str(tmp_path)])
    direction_search.main()
    file = tmp_path / direction_search.SEARCHES
    first, lines = read(file), file.read_text().splitlines()
    assert len(lines) == 4
    file.write_text("\n".join(lines[:3]) + "\n")
    capsys.readouterr()
    direction_search.main()
    assert "4 searches, 3 of them are finished" in capsys.readouterr().out
    assert {job: o.found for job, o in read(file).items()} == {j: o.found for j, o in first.items()}
    assert kept[0]["methods"] == kept[1]["methods"]
    table = tables.direction_search_table(json.loads(json.dumps(kept[0])), ("clean",))
    assert [line.split("`")[1] for line in table[2:4]] == methods
    assert "2 seeds" in table[-1]
    assert tables.direction_search_table(kept[0], ("demo",)) == []


def test_no_scored_prompt_has_an_outlying_word() -> None:
    sets = dict(prompts(SUBJECTS["outliers"]))
    with_it = {n: sum(OUTLYING in p.user for p in s.prompts) for n, s in sets.items()}
    assert with_it == {"behaviour": 4, "neutral": 0, "keyword-rate": 0, "kl-divergence": 0}
