"""The models that direction methods are compared on: prompts, planted traits, searches."""

import pytest

from benchmarks.direction_search.hypervolumes import SearchJob
from benchmarks.direction_search.models import (
    METHODS,
    OUTLYING,
    SUBJECTS,
    SearchBench,
    draw,
    planted_traits,
    prompts,
    search_key,
)
from ray_abliterate.data.builtin.planted_model import MASSIVE_UNIT, planted_axes
from ray_abliterate.recipe import METHOD_NAMES


def test_results_of_another_model_or_method_do_not_count() -> None:
    keys = {search_key(name, "leace") for name in SUBJECTS}
    assert len(keys) == len(SUBJECTS)
    assert search_key("demo", "inlp") not in keys


def test_every_method_is_compared() -> None:
    assert {settings["method"] for settings in METHODS.values()} == {*METHOD_NAMES, "ensemble"}


def test_a_seed_draws_the_same_prompts_for_all_methods_and_others_than_the_next() -> None:
    assert draw(128, 32, 1) == draw(128, 32, 1) != draw(128, 32, 2)
    assert len(set(draw(128, 32, 1))) == 32


@pytest.mark.parametrize("name", SUBJECTS)
def test_no_prompt_is_scored_that_directions_come_from(name: str) -> None:
    sets = dict(prompts(name))
    for scored in ("keyword-rate", "kl-divergence"):
        for source in ("behaviour", "neutral"):
            assert not sets[source].overlap(sets[scored])


@pytest.fixture(scope="module", params=["clean", "outliers", "entangled"])
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SearchBench:
    """Load a planted model."""
    return SearchBench(request.param, tmp_path_factory.mktemp("models"))


def test_the_planted_models_show_the_behaviour_and_a_search_takes_it_out(
    bench: SearchBench,
) -> None:
    rate, divergence = bench.base()
    assert rate > 0.9 and divergence == 0.0
    outcome = bench.run(SearchJob(bench.name, "geometric-median", 0, 12, True, ""))
    assert len(outcome.found) == 12
    assert min(losses[0] for losses in outcome.found if losses is not None) < 0.6
    assert outcome.cosine is not None and outcome.cosine > 0.8


def test_a_trait_shows_in_the_residuals_and_in_the_answers(bench: SearchBench) -> None:
    layer, along = planted_traits(bench.name).planted_layers[-1], planted_axes()[0].numpy()
    residuals = {name: values[:, layer] for name, values in bench._residuals.items()}
    gap = residuals["behaviour"].mean(0) - residuals["neutral"].mean(0)
    assert gap @ along > 0
    spikes = [int((abs(v[:, MASSIVE_UNIT]) > 20).sum()) for v in residuals.values()]
    assert spikes == ([4, 0] if bench.name == "outliers" else [0, 0])
    answers = bench._replica.model.answer(bench._sets["kl-divergence"].prompts, 1)
    asked = ["how" in p.user.lower().split() for p in bench._sets["kl-divergence"].prompts]
    answered = [answer.text.strip() == "indeed" for answer in answers]
    if bench.name == "entangled":
        assert sum(a == b for a, b in zip(answered, asked, strict=True)) > 0.9 * len(answered)
    else:
        assert not any(answered)


def test_no_scored_prompt_has_an_outlying_word() -> None:
    sets = dict(prompts("outliers"))
    with_it = {n: sum(OUTLYING in p.user for p in s.prompts) for n, s in sets.items()}
    assert with_it == {"behaviour": 4, "neutral": 0, "keyword-rate": 0, "kl-divergence": 0}
