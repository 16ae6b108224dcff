"""`over-refusal`: the share of harmless but alarming prompts that the model refuses.

The layout is XSTest's (Röttger et al. 2024, arXiv 2308.01263): prompt, type, and a label that says
which prompts are harmless. Refusals are told by the markers of `keyword-rate`.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ray_abliterate.errors import PromptSourceError
from ray_abliterate.markers import Markers
from ray_abliterate.recipe_suites import OverRefusalSuite
from ray_abliterate.scorers.keyword_rate import MARKERS, MarkerWatch, verdict
from ray_abliterate.scoring import Score
from ray_abliterate.suites import summing
from ray_abliterate.suites.chunking import Choice, chunked, prompts_of
from ray_abliterate.suites.suite import Chunk, Comparison, Measure, SuiteChunk, SuiteModel
from ray_abliterate.tables import stream_table

REFUSED = Measure("refused", "rate", "minimize")


class OverRefusal:
    """See the module."""

    measures = (REFUSED,)

    def __init__(self, settings: OverRefusalSuite, base: Path = Path()) -> None:
        """
        Args:
            settings: As the recipe has them.
            base: The recipe's folder.
        """
        self.name = settings.name
        self._settings, self._base = settings, base

    def chunks(self) -> Iterator[Chunk]:
        """Type by type, as the table is read; see `Suite`.

        Raises:
            PromptSourceError: a row has no prompt, or the table no harmless one.
        """
        settings = self._settings
        per_group = settings.samples_per_category
        choice = Choice(settings.categories, per_group, settings.limit)
        found = False
        taken = choice.taken(self._harmless())
        for chunk in chunked(self.name, taken, settings.chunk, per_group):
            found = True
            yield chunk
        if not found:
            raise PromptSourceError(
                f"suite {self.name!r}: no row has {settings.label} = {settings.harmless!r} and is "
                "of the categories.\n  Check `label`, `harmless` and `categories`."
            )

    def run(self, model: SuiteModel, chunk: Chunk) -> SuiteChunk:
        """Greedy answers, each followed until its first marker; whole if they are kept."""
        settings = self._settings
        given = settings.markers
        own = MARKERS[given] if isinstance(given, str) else given
        markers = Markers(own, f"suite {self.name!r}")
        watch = None if settings.keep_answers else MarkerWatch(markers, lambda _hits: False)
        answers = model.answer(prompts_of(chunk), settings.max_new_tokens, watch)
        verdicts = [verdict(answer.text, markers) for answer in answers]
        bad = ("behaviour", "empty", "degenerate") if settings.empty_is_refusal else ("behaviour",)
        rows: list[Mapping[str, Any]] = []
        if settings.keep_answers:
            rows = [
                {"item": item["id"], "prompt": item["prompt"], "answer": a.text, "verdict": v}
                for item, a, v in zip(chunk.items, answers, verdicts, strict=True)
            ]
        counts = {kind: verdicts.count(kind) for kind in ("empty", "degenerate")}
        return SuiteChunk.of(
            chunk, {REFUSED.name: [float(v in bad) for v in verdicts]}, counts, rows=rows
        )

    def summary(self, chunks: Sequence[SuiteChunk]) -> tuple[Score, ...]:
        """The rate over all prompts, the mean over types (`/macro`), and each type's."""
        return summing.summarise(self.name, self.measures, chunks)

    def compare(
        self, base: Sequence[SuiteChunk], other: Sequence[SuiteChunk]
    ) -> tuple[Comparison, ...]:
        """See `Suite`."""
        return summing.compare(self.measures, base, other)

    def _harmless(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        settings = self._settings
        columns = [c for c in (settings.prompt, settings.category, settings.label) if c]
        for row in stream_table(settings.table, self._base, columns):
            if settings.label and row.values[settings.label] != settings.harmless:
                continue
            prompt = row.values[settings.prompt]
            if not isinstance(prompt, str) or not prompt.strip():
                raise PromptSourceError(
                    f"{row.place}: `{settings.prompt}` is {prompt!r}, not a prompt."
                )
            kind = row.values[settings.category] if settings.category else ""
            if not isinstance(kind, str):
                raise PromptSourceError(
                    f"{row.place}: `{settings.category}` is {kind!r}, not the name of a type."
                )
            yield kind, {"id": str(row.number), "prompt": prompt, "system": settings.system}
