"""`kl`: KL divergence from the base model, at each of many tokens of the base model's own answers.

    (1/T) Σ_t KL(base(· | prompt, y_<t) ‖ edited(· | prompt, y_<t))     y: the base model's answer

Exact, and bounded in memory: no base logits are kept between chunks. For each chunk the model is
put back to the base model, which writes its greedy answers and reads them, and is edited again, to
read the same. That costs, for each chunk, T steps of decoding, two passes over prompts and answers,
and writing all edited matrices twice, at memory speed; in memory it takes the base logits of one
chunk (prompts x T x vocabulary x 4 bytes) and those of the edited model.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from ray_abliterate.recipe_suites import KlSuite
from ray_abliterate.scorers.kl_divergence import divergence
from ray_abliterate.scoring import Score
from ray_abliterate.sources import load_prompt_set
from ray_abliterate.suites import summing
from ray_abliterate.suites.chunking import chunked, prompt_items, prompts_of
from ray_abliterate.suites.suite import Chunk, Comparison, Measure, SuiteChunk, SuiteModel

DIVERGENCE = Measure("kl", "mean", "minimize", "nats per token")
TOKENS_AT_ONCE = 256
"""Tokens of answers in a chunk: 156 MB of base logits for a vocabulary of 152,000."""


class KlDivergenceSuite:
    """See the module."""

    measures = (DIVERGENCE,)

    def __init__(self, settings: KlSuite, base: Path = Path()) -> None:
        """
        Args:
            settings: As the recipe has them.
            base: The recipe's folder.
        """
        self.name = settings.name
        self._settings, self._base = settings, base

    def chunks(self) -> Iterator[Chunk]:
        """See `Suite`."""
        settings = self._settings
        size = settings.chunk or max(1, TOKENS_AT_ONCE // settings.tokens)
        prompts = load_prompt_set(self.name, settings.prompts, self._base)
        return chunked(self.name, prompt_items(prompts, settings.limit), size)

    def run(self, model: SuiteModel, chunk: Chunk) -> SuiteChunk:
        """Mean over the tokens of each prompt's answer; `identical` counts tokens at which the two
        models' logits are the same to the last bit."""
        prompts = prompts_of(chunk)
        with model.original():
            answers = model.continue_greedily(prompts, self._settings.tokens)
            base = model.continuation_logits(prompts, answers)
        edited = model.continuation_logits(prompts, answers)
        values, identical, nats = [], 0, []
        for one, other in zip(base, edited, strict=True):
            own = divergence(one, other).double()
            values.append(float(own.mean()))
            nats += own.tolist()
            identical += int(torch.eq(one, other).all(dim=-1).sum())
        counts = {"tokens": len(nats), "identical": identical}
        return SuiteChunk.of(chunk, {DIVERGENCE.name: values}, counts)

    def summary(self, chunks: Sequence[SuiteChunk]) -> tuple[Score, ...]:
        """Mean over prompts of the mean over tokens."""
        return summing.summarise(self.name, self.measures, chunks)

    def compare(
        self, base: Sequence[SuiteChunk], other: Sequence[SuiteChunk]
    ) -> tuple[Comparison, ...]:
        """See `Suite`."""
        return summing.compare(self.measures, base, other)
