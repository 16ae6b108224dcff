"""`responses`: answers to prompts, kept for reading. Nothing is scored but their length."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from ray_abliterate.recipe_suites import ResponsesSuite
from ray_abliterate.scoring import Score
from ray_abliterate.sources import load_prompt_set
from ray_abliterate.suites import summing
from ray_abliterate.suites.chunking import chunked, prompt_items, prompts_of
from ray_abliterate.suites.suite import Chunk, Comparison, Measure, SuiteChunk, SuiteModel

LENGTH = Measure("tokens", "mean", "report", "tokens")


class Responses:
    """See the module."""

    measures = (LENGTH,)

    def __init__(self, settings: ResponsesSuite, base: Path = Path()) -> None:
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
        prompts = load_prompt_set(self.name, settings.prompts, self._base)
        return chunked(self.name, prompt_items(prompts, settings.limit), settings.chunk)

    def run(self, model: SuiteModel, chunk: Chunk) -> SuiteChunk:
        """Answers in `rows`; sampled ones with a seed of the chunk's own."""
        settings, prompts = self._settings, prompts_of(chunk)
        if settings.temperature == 0:
            answers = model.answer(prompts, settings.max_new_tokens)
        else:
            own = hashlib.sha256(f"{settings.seed} {chunk.id}".encode()).digest()
            seed = int.from_bytes(own[:7], "big")
            answers = model.sample(
                prompts, settings.max_new_tokens, settings.temperature, settings.top_p, seed
            )
        rows = [
            {"item": item["id"], "prompt": item["prompt"], "answer": a.text, "tokens": a.tokens}
            for item, a in zip(chunk.items, answers, strict=True)
        ]
        return SuiteChunk.of(chunk, {LENGTH.name: [float(a.tokens) for a in answers]}, rows=rows)

    def summary(self, chunks: Sequence[SuiteChunk]) -> tuple[Score, ...]:
        """How long answers are; the answers themselves are in the chunks' `rows`."""
        return summing.summarise(self.name, self.measures, chunks)

    def compare(
        self, base: Sequence[SuiteChunk], other: Sequence[SuiteChunk]
    ) -> tuple[Comparison, ...]:
        """See `Suite`."""
        return summing.compare(self.measures, base, other)
