"""`responses`: answers to prompts, stored for people to read. Only their length is scored."""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

from ray_abliterate.data.prompt_sources import load_prompt_set
from ray_abliterate.evaluation.suites.chunks import prompt_items, prompts_of
from ray_abliterate.evaluation.suites.item_suite import ItemSuite
from ray_abliterate.evaluation.suites.suite import Chunk, Measure, SuiteChunk, SuiteModel
from ray_abliterate.recipe.suites import ResponsesSuite

LENGTH = Measure("tokens", "mean", "report", "tokens")


class Responses(ItemSuite[ResponsesSuite]):
    """Stores answers, greedy or sampled, in the `rows` of each chunk."""

    measures = (LENGTH,)

    def items(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield the prompts as items."""
        return prompt_items(load_prompt_set(self.name, self.settings.prompts, self.base))

    def run(self, model: SuiteModel, chunk: Chunk) -> SuiteChunk:
        """Return answers in `rows`; sampled ones depend on the seed and the chunk's id only."""
        settings, prompts = self.settings, prompts_of(chunk)
        if settings.temperature == 0:
            answers = model.answer(prompts, settings.max_new_tokens)
        else:
            digest = hashlib.sha256(f"{settings.seed} {chunk.id}".encode()).digest()
            seed = int.from_bytes(digest[:7], "big")
            answers = model.sample(
                prompts, settings.max_new_tokens, settings.temperature, settings.top_p, seed
            )
        rows = [
            {"item": item["id"], "prompt": item["prompt"], "answer": a.text, "tokens": a.tokens}
            for item, a in zip(chunk.items, answers, strict=True)
        ]
        return SuiteChunk.of(chunk, {LENGTH.name: [float(a.tokens) for a in answers]}, rows=rows)
