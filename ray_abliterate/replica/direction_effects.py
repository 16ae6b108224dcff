"""The effect of one layer's direction: what answers begin with when it is ablated, and when added.

One pass over held-out prompts with the direction ablated in every writer, one over the neutral ones
with it added to the residual stream after its layer; only last-token logits are read.
`directions/layer_selection.py` chooses a layer from them. Knows nothing about the search.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from ray_abliterate.ablation.weight_cache import WeightCache
from ray_abliterate.directions.directions import Directions
from ray_abliterate.directions.layer_selection import LayerScores
from ray_abliterate.errors import ScoreError
from ray_abliterate.evaluation.scorers.kl_divergence import kl_divergence
from ray_abliterate.evaluation.scorers.refusal_log_odds import first_tokens, log_odds
from ray_abliterate.model.language_model import LanguageModel
from ray_abliterate.replica.messages import EffectPrompts
from ray_abliterate.search.plan import ModelShape, Plan


@dataclass(frozen=True)
class _BaseAnswers:
    """How the unedited model begins its answers to the prompts.

    Attributes:
        tokens: First tokens of refusals.
        odds: Mean log odds of a refusal, of behaviour and neutral prompts.
        neutral: Last-token logits of the neutral prompts.
    """

    tokens: tuple[int, ...]
    odds: tuple[float, float]
    neutral: Float[Tensor, "prompt vocab"]


class DirectionEffects:
    """Measures directions on one model; its unedited answers are computed once per prompts."""

    def __init__(self, model: LanguageModel, cache: WeightCache, shape: ModelShape) -> None:
        """Compute nothing yet.

        Args:
            model: The model, as it was loaded.
            cache: Pristine weights of its writers.
            shape: Its shape.
        """
        self._model, self._cache, self._shape = model, cache, shape
        self._known: tuple[Any, _BaseAnswers] | None = None

    def scores(
        self, prompts: EffectPrompts, layer: int, length: float, directions: Directions
    ) -> LayerScores:
        """Return what a layer's direction does to answers; a score that is not finite is a problem.

        Args:
            prompts: Held-out prompts.
            layer: Whose direction.
            length: How far it is added, in units of the residual stream.
            directions: All directions; that layer's subspace is ablated, its first direction added.
        """
        with self._model.without_storing():
            base = self._base_answers(prompts)
            try:
                return self._scores(prompts, base, layer, length, directions)
            except ScoreError as error:
                problem = str(error).partition("\n")[0]
                return LayerScores(layer, None, None, None, base.odds, problem)

    def _scores(
        self,
        prompts: EffectPrompts,
        base: _BaseAnswers,
        layer: int,
        length: float,
        directions: Directions,
    ) -> LayerScores:
        count = len(prompts.behaviour)
        plan = Plan.uniform(self._shape, float(layer), "none")
        with self._cache.edited(plan, directions):
            # (behaviour + neutral prompt, vocab)
            logits = self._model.next_token_logits([*prompts.behaviour, *prompts.neutral])
        ablated = float(log_odds(logits[:count], base.tokens).mean())
        moved = float(kl_divergence(base.neutral, logits[count:]).mean())
        with direction_added(self._model.blocks[layer], length * directions.vectors[layer]):
            steered = self._model.next_token_logits(prompts.neutral)  # (neutral prompt, vocab)
        added = float(log_odds(steered, base.tokens).mean())
        return LayerScores(layer, ablated, added, moved, base.odds)

    def _base_answers(self, prompts: EffectPrompts) -> _BaseAnswers:
        key = prompts, self._model.response_prefix
        if self._known is None or self._known[0] != key:
            count = len(prompts.behaviour)
            tokens = first_tokens(self._model, prompts.openings)
            logits = self._model.next_token_logits([*prompts.behaviour, *prompts.neutral])
            odds = log_odds(logits, tokens)
            means = float(odds[:count].mean()), float(odds[count:].mean())
            self._known = key, _BaseAnswers(tokens, means, logits[count:].clone())
        return self._known[1]


@contextmanager
def direction_added(block: nn.Module, vector: Float[Tensor, " hidden"]) -> Iterator[None]:
    """Add a vector to the output of a residual block, at every token, during the `with` block."""

    def add(_module: nn.Module, _args: Any, output: Any) -> Any:
        parts: Sequence[Any] = output if isinstance(output, tuple | list) else (output,)
        hidden = parts[0] + vector.to(parts[0].device, parts[0].dtype)  # (row, position, hidden)
        return hidden if parts[0] is output else type(output)((hidden, *parts[1:]))

    handle = block.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()
