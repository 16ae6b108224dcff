"""A replica: what it is comes from its constructor, and a score from nothing but the plan."""

from pathlib import Path

import pytest
import torch

from ray_abliterate.data.prompts import PromptSet
from ray_abliterate.directions.compute import directions_from_residuals
from ray_abliterate.directions.directions import Directions
from ray_abliterate.directions.residuals.residual_set import join
from ray_abliterate.directions.residuals.shard import ResidualShard
from ray_abliterate.errors import ScoreError
from ray_abliterate.model.batch_size import Tuning
from ray_abliterate.model.language_model import LanguageModel
from ray_abliterate.recipe import Recipe
from ray_abliterate.replica.messages import TrialSetup
from ray_abliterate.replica.replica import Replica
from ray_abliterate.search.dominance import ThresholdSet
from ray_abliterate.search.plan import Plan


@pytest.fixture
def replica(recipe: Recipe, planted: Path, behaviour: PromptSet, neutral: PromptSet) -> Replica:
    sets = {"keyword-rate": behaviour, "kl-divergence": neutral}
    return Replica(recipe, str(planted), sets)


@pytest.fixture
def setup(replica: Replica, recipe: Recipe, behaviour: PromptSet, neutral: PromptSet) -> TrialSetup:
    shards = [
        ResidualShard(replica.extract_residuals(s.name, 0, s.prompts, ()))
        for s in (behaviour, neutral)
    ]
    return TrialSetup(
        directions_from_residuals(*(join([shard]) for shard in shards), recipe.direction)
    )


def plans(replica: Replica) -> list[Plan]:
    shape = replica.describe().shape
    return [Plan.uniform(shape, 2.3, "none", s) for s in (1.0, 0.9, 0.0)]


def test_the_base_model_has_no_divergence_and_the_edited_one_has(
    replica: Replica, setup: TrialSetup
) -> None:
    base = replica.evaluate(Plan.nothing(), setup).scorecard
    edited = replica.evaluate(plans(replica)[0], setup).scorecard
    assert (base["keyword-rate"].value, base["kl-divergence"].value) == (1.0, 0.0)
    assert edited["keyword-rate"].value == 0.0
    assert edited["kl-divergence"].value > 0.0


def test_a_score_depends_on_the_plan_and_not_on_earlier_trials(
    replica: Replica, setup: TrialSetup
) -> None:
    first, second, nothing = plans(replica)
    alone = replica.evaluate(first, setup).scorecard
    for plan in (second, nothing, Plan.nothing()):
        replica.evaluate(plan, setup)
    assert replica.evaluate(first, setup).scorecard == alone


def test_a_new_replica_gives_the_same_scores(
    replica: Replica, setup: TrialSetup, recipe: Recipe, planted: Path,
    behaviour: PromptSet, neutral: PromptSet,
) -> None:  # fmt: skip
    sets = {"keyword-rate": behaviour, "kl-divergence": neutral}
    plan = plans(replica)[1]
    again = Replica(recipe, str(planted), sets).evaluate(plan, setup).scorecard
    assert replica.evaluate(plan, setup).scorecard == again


def test_a_metric_that_does_not_see_an_edit_is_an_error_and_not_a_score(
    replica: Replica, setup: TrialSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    constant = torch.randn(7, 30)
    monkeypatch.setattr(LanguageModel, "next_token_logits", lambda self, prompts: constant)
    assert replica.evaluate(Plan.nothing(), setup).scorecard["kl-divergence"].value == 0.0
    with pytest.raises(ScoreError, match="exactly 0 although weights were edited"):
        replica.evaluate(plans(replica)[0], setup)


def test_an_error_in_a_scorer_leaves_the_base_model(
    replica: Replica, setup: TrialSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = replica.evaluate(Plan.nothing(), setup).scorecard
    with monkeypatch.context() as broken:
        broken.setattr(LanguageModel, "answer", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            replica.evaluate(plans(replica)[0], setup)
    assert replica.evaluate(Plan.nothing(), setup).scorecard == before


def test_other_values_of_any_one_parameter_are_seen(
    replica: Replica, recipe: Recipe, planted: Path
) -> None:
    before = replica.describe().fingerprint
    assert Replica(recipe, str(planted), {}).describe().fingerprint == before
    for name, parameter in replica.model.module.named_parameters():
        original = parameter.detach().clone()
        with torch.no_grad():
            parameter.mul_(1.001).add_(1e-3)
        assert replica.describe().fingerprint != before, name
        with torch.no_grad():
            parameter.copy_(original)
        assert replica.describe().fingerprint == before


def test_residuals_are_a_record_batch_in_the_dtype_that_the_recipe_wants(
    recipe: Recipe, planted: Path, neutral: PromptSet
) -> None:
    for dtype in ("float32", "float16"):
        direction = recipe.direction.model_copy(update={"residual_dtype": dtype})
        replica = Replica(recipe.model_copy(update={"direction": direction}), str(planted), {})
        shard = ResidualShard(replica.extract_residuals("neutral", 3, neutral.prompts[3:5], ()))
        assert (shard.name, shard.first, shard.prompts) == ("neutral", 3, 2)
        assert shard.layer(0).dtype == dtype
        direct = replica.model.residuals(neutral.prompts[3:5])
        torch.testing.assert_close(
            torch.from_numpy(shard.values()), direct, rtol=0 if dtype == "float32" else 1e-3,
            atol=0 if dtype == "float32" else 1e-3,
        )  # fmt: skip


def test_a_batch_is_read_whole_whatever_the_replica_would_choose(
    replica: Replica, neutral: PromptSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    each = LanguageModel._for_each_batch

    def counted(self: LanguageModel, key: str, rows: list, work: object, size: int, *rest) -> None:
        sizes.append(size)
        each(self, key, rows, work, size, *rest)

    monkeypatch.setattr(LanguageModel, "_for_each_batch", counted)
    for chosen in (1, 7):
        replica.model.use(Tuning(chosen, chosen, 1, False))
        replica.extract_residuals("neutral", 0, neutral.prompts, (), Tuning(5, 5, 1, False))
    assert sizes == [5, 5]


def test_answers_are_recorded_whole_when_the_recipe_asks_for_them(
    recipe: Recipe, planted: Path, behaviour: PromptSet, neutral: PromptSet, setup: TrialSetup
) -> None:
    run = recipe.run.model_copy(update={"record_responses": True})
    sets = {"keyword-rate": behaviour, "kl-divergence": neutral}
    recording = Replica(recipe.model_copy(update={"run": run}), str(planted), sets)
    rows = recording.evaluate(Plan.nothing(), setup).answers
    assert [row["prompt"] for row in rows] == [prompt.user for prompt in behaviour.prompts]
    assert {(row["answer"], row["shows_behaviour"]) for row in rows} == {("sorry", True)}


def test_a_plan_that_moves_the_model_too_far_is_not_asked_for_answers(
    replica: Replica, setup: TrialSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plans(replica)[0]
    whole = replica.evaluate(plan, setup).scorecard
    before = replica.describe().fingerprint
    with monkeypatch.context() as silent:
        silent.setattr(LanguageModel, "answer", lambda *_: 1 / 0)
        thresholds = ThresholdSet(((0.0, whole["kl-divergence"].value / 2),))
        card = replica.evaluate(plan, setup, thresholds).scorecard
    assert card["kl-divergence"] == whole["kl-divergence"]
    assert card["keyword-rate"].bound and card["keyword-rate"].value == 0.0
    assert not replica.cache.differs() and replica.describe().fingerprint == before
    assert replica.evaluate(plan, setup).scorecard == whole


@pytest.fixture
def early(recipe: Recipe, planted: Path, behaviour: PromptSet, neutral: PromptSet) -> Replica:
    """Finds its marker before the answer ends, whose last letter is held back until then."""
    rate, moved = recipe.scorers
    half = (rate.model_copy(update={"markers": ("sorr",)}), moved)
    sets = {"keyword-rate": behaviour, "kl-divergence": neutral}
    return Replica(recipe.model_copy(update={"scorers": half}), str(planted), sets)


def test_answers_are_stopped_once_too_many_show_the_behaviour(
    early: Replica, setup: TrialSetup
) -> None:
    """The base model declines all 7; with 2 in 7 reached before, the third is one too many."""
    card = early.evaluate(Plan.nothing(), setup, ThresholdSet(((2 / 7, 0.0),))).scorecard
    score = card["keyword-rate"]
    assert score.bound and 3 / 7 <= score.value and score.high == 1.0
    assert card["kl-divergence"].value == 0.0 and not card["kl-divergence"].bound
    whole = early.evaluate(Plan.nothing(), setup).scorecard["keyword-rate"]
    assert whole.value == 1.0 and not whole.bound


def test_thresholds_that_do_not_beat_a_plan_change_no_score(
    replica: Replica, setup: TrialSetup
) -> None:
    for plan in plans(replica):
        whole = replica.evaluate(plan, setup).scorecard
        rate, moved = whole.losses
        thresholds = ThresholdSet(((rate, moved), (rate + 1, 0.0), (0.0, moved + 1)))
        assert replica.evaluate(plan, setup, thresholds).scorecard == whole


def test_a_metric_that_does_not_see_an_edit_is_refused_in_a_pruned_trial_too(
    early: Replica, setup: TrialSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    constant = torch.randn(7, 30)
    monkeypatch.setattr(LanguageModel, "next_token_logits", lambda self, prompts: constant)
    weak = Plan.uniform(early.describe().shape, 2.3, "none", 0.01)
    with pytest.raises(ScoreError, match="exactly 0 although weights were edited"):
        early.evaluate(weak, setup, ThresholdSet(((2 / 7, 0.0),)))


def test_recorded_answers_are_whole_and_those_of_this_trial(
    recipe: Recipe, planted: Path, behaviour: PromptSet, neutral: PromptSet, setup: TrialSetup
) -> None:
    run = recipe.run.model_copy(update={"record_responses": True})
    sets = {"keyword-rate": behaviour, "kl-divergence": neutral}
    recording = Replica(recipe.model_copy(update={"run": run}), str(planted), sets)
    late = recording.evaluate(Plan.nothing(), setup, ThresholdSet(((2 / 7, 0.0),)))
    assert len(late.answers) == 7 and late.scorecard["keyword-rate"].value == 1.0
    early = recording.evaluate(plans(recording)[0], setup, ThresholdSet(((0.0, 1e-9),)))
    assert early.scorecard.pruned and early.answers == ()


def test_another_setup_is_prepared_again(replica: Replica, setup: TrialSetup) -> None:
    plan = plans(replica)[0]
    there = replica.evaluate(plan, setup).scorecard
    vectors = setup.directions.vectors.roll(1, dims=1)
    other = TrialSetup(Directions(vectors, "other", {}))
    assert replica.evaluate(plan, other).scorecard != there
    assert replica.evaluate(plan, setup).scorecard == there


def test_chat_shows_the_edit(replica: Replica, setup: TrialSetup) -> None:
    turns = [{"role": "user", "content": "explain the soup"}]
    assert replica.respond(turns, Plan.nothing(), setup, 4) == "sorry"
    assert replica.respond(turns, plans(replica)[0], setup, 4) == "sure"
