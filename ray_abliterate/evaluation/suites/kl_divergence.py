"""`kl`: KL divergence from the base model at each of many tokens of the base model's own answers.

    (1/T) Σ_t KL(base(· | prompt, y_<t) ‖ edited(· | prompt, y_<t))     y: the base model's answer

It is exact, and bounded in memory: no base logits are stored between chunks. For each chunk the
model is restored to the base model, which generates its greedy answers and reads them, and is
edited again, to read the same. For each chunk that costs T steps of decoding, two passes over
prompts and answers, and writing all edited matrices twice, at memory speed; in memory it takes the
base logits of one chunk (prompts x T x vocabulary x 4 bytes) and those of the edited model.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ray_abliterate.data.prompt_sources import load_prompt_set
from ray_abliterate.evaluation.scorers.kl_divergence import kl_divergence
from ray_abliterate.evaluation.suites.chunks import prompt_items, prompts_of
from ray_abliterate.evaluation.suites.item_suite import ItemSuite
from ray_abliterate.evaluation.suites.suite import Chunk, Measure, SuiteChunk, SuiteModel
from ray_abliterate.recipe.suites import KlSuite

DIVERGENCE = Measure("kl", "mean", "minimize", "nats per token")
TOKENS_AT_ONCE = 256
"""Tokens of answers in a chunk: 156 MB of base logits for a vocabulary of 152,000."""


class KlDivergenceSuite(ItemSuite[KlSuite]):
    """Measures the divergence along answers; see the formula above."""

    measures = (DIVERGENCE,)

    def items(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield the prompts as items."""
        return prompt_items(load_prompt_set(self.name, self.settings.prompts, self.base))

    def chunk_size(self) -> int:
        """Return how many prompts have their base logits in memory at once."""
        return self.settings.chunk or max(1, TOKENS_AT_ONCE // self.settings.tokens)

    def run(self, model: SuiteModel, chunk: Chunk) -> SuiteChunk:
        """Return the mean over the tokens of each prompt's answer.

        `identical` counts tokens at which the two models' logits are the same to the last bit.
        """
        prompts = prompts_of(chunk)
        with model.unedited():
            answers = model.continue_greedily(prompts, self.settings.tokens)
            base = model.continuation_logits(prompts, answers)
        edited = model.continuation_logits(prompts, answers)
        values, identical, nats = [], 0, []
        for before, after in zip(base, edited, strict=True):  # logits, (token, vocab)
            divergences = kl_divergence(before, after).double()
            values.append(float(divergences.mean()))
            nats += divergences.tolist()
            identical += int(torch.eq(before, after).all(dim=-1).sum())
        counts = {"tokens": len(nats), "identical": identical}
        return SuiteChunk.of(chunk, {DIVERGENCE.name: values}, counts)
