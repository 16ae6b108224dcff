"""What one layer's direction does to a model: answers begun without it, and with more of it.

One pass over held-out prompts with the direction taken out of every writer, one over the neutral
ones with it added to the stream after its layer; last-token logits are all that is read. See
`directions.selection` for what is made of it. Knows nothing about other layers, or the search.
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
class _Base:
    """What the base model says to the prompts of a probe."""

    tokens: tuple[int, ...]
    odds: tuple[float, float]
    neutral: Float[Tensor, "prompt vocab"]


class DirectionEffects:
    """Tries directions on one model; what its base model says is computed once per probe."""

    def __init__(self, model: LanguageModel, cache: WeightCache, shape: ModelShape) -> None:
        self._model, self._cache, self._shape = model, cache, shape
        self._known: tuple[Any, _Base] | None = None

    def scores(
        self, probe: EffectPrompts, layer: int, length: float, directions: Directions
    ) -> LayerScores:
        """What a layer's direction does.

        Args:
            probe: The prompts.
            layer: Whose direction.
            length: How far it is added, in units of the residual stream.
            directions: All directions; the subspace of that layer is taken out, its first added.
        """
        with self._model.without_storing():
            base = self._base(probe)
            try:
                return self._scores(probe, base, layer, length, directions)
            except ScoreError as error:
                problem = str(error).partition("\n")[0]
                return LayerScores(layer, None, None, None, base.odds, problem)

    def _scores(
        self, probe: EffectPrompts, base: _Base, layer: int, length: float, directions: Directions
    ) -> LayerScores:
        count = len(probe.behaviour)
        plan = Plan.uniform(self._shape, float(layer), "none")
        with self._cache.edited(plan, directions):
            logits = self._model.next_token_logits([*probe.behaviour, *probe.neutral])
        ablated = float(log_odds(logits[:count], base.tokens).mean())
        moved = float(kl_divergence(base.neutral, logits[count:]).mean())
        with added(self._model.blocks[layer], length * directions.vectors[layer]):
            more = self._model.next_token_logits(probe.neutral)
        return LayerScores(
            layer, ablated, float(log_odds(more, base.tokens).mean()), moved, base.odds
        )

    def _base(self, probe: EffectPrompts) -> _Base:
        key = probe, self._model.response_prefix
        if self._known is None or self._known[0] != key:
            count = len(probe.behaviour)
            tokens = first_tokens(self._model, probe.openings)
            logits = self._model.next_token_logits([*probe.behaviour, *probe.neutral])
            odds = log_odds(logits, tokens)
            means = float(odds[:count].mean()), float(odds[count:].mean())
            self._known = key, _Base(tokens, means, logits[count:].clone())
        return self._known[1]


@contextmanager
def added(block: nn.Module, vector: Float[Tensor, " hidden"]) -> Iterator[None]:
    """What a residual block gives has a vector added, at every token, in this block of code."""

    def add(_module: nn.Module, _args: Any, output: Any) -> Any:
        whole: Sequence[Any] = output if isinstance(output, tuple | list) else (output,)
        moved = whole[0] + vector.to(whole[0].device, whole[0].dtype)
        return moved if whole[0] is output else type(output)((moved, *whole[1:]))

    handle = block.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()
