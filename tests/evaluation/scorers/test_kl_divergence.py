"""Divergences in closed form."""

import math

import pytest
import torch

from ray_abliterate.data.prompts import PromptSet
from ray_abliterate.errors import ScoreError
from ray_abliterate.evaluation.scorers.kl_divergence import KlDivergenceScorer, kl_divergence
from ray_abliterate.recipe import KlDivergence
from tests.support.text_models import ScriptedModel

PROMPTS = PromptSet.of("p", "one", "two", "three", "four")
SOURCE = {"builtin": "cooking-heldout"}


def kl(tokens: int = 1) -> KlDivergenceScorer:
    settings = KlDivergence.model_validate(
        {"kind": "kl-divergence", "prompts": SOURCE, "tokens": tokens}
    )
    return KlDivergenceScorer(settings, PROMPTS)


def test_the_divergence_is_base_from_edited_in_nats() -> None:
    base, edited = torch.tensor([[0.0, math.log(3)]]), torch.tensor([[0.0, 0.0]])
    expected = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert float(kl_divergence(base, edited)) == pytest.approx(expected, abs=1e-6)


def test_the_divergence_does_not_care_for_a_shift_of_the_logits() -> None:
    logits = torch.randn(3, 50)
    assert kl_divergence(logits, logits + 5).max() < 1e-6


@pytest.mark.parametrize("scale", [1e-4, 1.0, 80.0])
def test_the_divergence_is_finite_and_not_negative(scale: float) -> None:
    random = torch.Generator().manual_seed(0)
    base = scale * torch.randn(20, 5000, generator=random)
    for other in (base, base + 1e-7, scale * torch.randn(20, 5000, generator=random)):
        found = kl_divergence(base, other)
        assert torch.isfinite(found).all() and (found >= 0).all()


def test_tokens_that_both_models_rule_out_add_nothing() -> None:
    base, edited = torch.randn(1, 6), torch.randn(1, 6)
    shorter = kl_divergence(base[:, :4], edited[:, :4])
    base[:, 4:], edited[:, 4:] = -math.inf, -math.inf
    torch.testing.assert_close(kl_divergence(base, edited), shorter)
    torch.testing.assert_close(
        kl_divergence(base, torch.cat([edited[:, :4], torch.zeros(1, 2)], 1)).isfinite(),
        torch.tensor([True]),
    )


def test_a_token_that_only_the_edited_model_rules_out_is_an_error() -> None:
    base, edited = torch.zeros(1, 3), torch.tensor([[0.0, 0.0, -math.inf]])
    with pytest.raises(ScoreError, match="infinite"):
        kl_divergence(base, edited)


def test_logits_that_are_not_numbers_are_an_error() -> None:
    with pytest.raises(ScoreError, match="are NaN"):
        kl_divergence(torch.zeros(1, 3), torch.full((1, 3), math.nan))


def test_several_tokens_are_a_mean_and_not_a_sum() -> None:
    """Identical positions give the divergence of one; long and short answers weigh the same."""
    base, edited = torch.randn(4, 50), torch.randn(4, 50)
    scores = []
    for tokens in (1, 3):
        scorer = kl(tokens)
        scorer.prepare(ScriptedModel(logits=base))
        scores.append(scorer.score(ScriptedModel(logits=edited)).value)
    assert scores[0] == pytest.approx(scores[1], rel=1e-6)


def test_a_scorer_that_was_not_prepared_says_so() -> None:
    with pytest.raises(ScoreError, match="call prepare"):
        kl().score(ScriptedModel(logits=torch.zeros(4, 3)))


def test_the_best_divergence_is_none_and_there_is_no_largest() -> None:
    assert kl().best == 0.0
    settings = KlDivergence.model_validate(
        {"kind": "kl-divergence", "prompts": SOURCE, "goal": "maximize"}
    )
    assert KlDivergenceScorer(settings, PROMPTS).best == math.inf
