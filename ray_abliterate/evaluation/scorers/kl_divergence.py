"""`kl-divergence`: how far the edited model's next tokens are from the base model's, in nats.

KL(base ‖ edited) = Σ_t b(t) [log b(t) − log e(t)] from raw logits, in float32. With `tokens = 1`
at the first token of the answer; with more, at each token of the base model's own greedy answer,
fed to both models, so that they are compared in the same contexts.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from ray_abliterate.data.prompts import PromptSet
from ray_abliterate.errors import ScoreError
from ray_abliterate.model.text_model import TextModel
from ray_abliterate.recipe import KlDivergence
from ray_abliterate.search.score import Score, mean_interval

ROUNDING = 1e-4
"""A divergence less than this below 0, in nats, is float32 rounding over a vocabulary; set to 0."""


class KlDivergenceScorer:
    """Scores the mean divergence from the base model.

    Base logits stay in CPU memory: prompts x tokens x vocabulary x 4 bytes.
    """

    def __init__(self, settings: KlDivergence, prompts: PromptSet) -> None:
        self.name, self.goal = settings.name, settings.goal
        self.best = math.inf if self.goal == "maximize" else 0.0
        self._tokens, self._prompts = settings.tokens, prompts
        self._continuations: list[list[int]] | None = None
        self._base: list[Tensor] = []

    def prepare(self, model: TextModel) -> None:
        """Store the base model's logits, and with `tokens > 1` its greedy answers."""
        if self._tokens > 1:
            self._continuations = model.continue_greedily(self._prompts.prompts, self._tokens)
        self._base = self._logits(model)

    def score(self, model: TextModel) -> Score:
        """Return the mean over prompts of the mean over tokens, with a bootstrap interval.

        Raises:
            ScoreError: `prepare` was not called, or the divergence is not a finite number.
        """
        if not self._base:
            raise ScoreError(f"{self.name}: call prepare() on the base model before score()")
        edited = self._logits(model)
        per_prompt = [
            float(kl_divergence(base, new).mean())
            for base, new in zip(self._base, edited, strict=True)
        ]
        mean, low, high = mean_interval(per_prompt)
        detail = {
            "prompts": len(per_prompt),
            "tokens": sum(len(base) for base in self._base),
            "largest": max(per_prompt),
        }
        return Score(self.name, mean, low, high, self.goal, "nats per token", detail)

    def _logits(self, model: TextModel) -> list[Float[Tensor, "token vocab"]]:
        prompts = self._prompts.prompts
        if self._continuations is None:
            return [row[None] for row in model.next_token_logits(prompts)]
        return model.continuation_logits(prompts, self._continuations)


def kl_divergence(
    base: Float[Tensor, "token vocab"], edited: Float[Tensor, "token vocab"]
) -> Float[Tensor, " token"]:
    """Return KL(base ‖ edited) of each row of logits, in nats, finite and ≥ 0.

    A token that the base model rules out (logit −∞) adds nothing.

    Raises:
        ScoreError: a logit is NaN, or the edited model rules out a token the base model allows.
    """
    if base.isnan().any() or edited.isnan().any():
        raise ScoreError("the model's logits are NaN: the edit has broken it")
    p, q = torch.log_softmax(base.float(), dim=-1), torch.log_softmax(edited.float(), dim=-1)
    terms = torch.where(p.isneginf(), 0.0, p.exp() * (p - q))
    total = terms.sum(dim=-1)
    if not torch.isfinite(total).all():
        raise ScoreError(
            "the edited model gives probability 0 to a token that the base model allows, so the "
            "KL divergence is infinite"
        )
    if total.min() < -ROUNDING:
        raise ScoreError(f"the KL divergence came out as {float(total.min()):.2e}, below 0")
    return total.clamp_min(0.0)
