"""`over-refusal`: the share of harmless but alarming prompts that the model refuses.

The layout is XSTest's (Röttger et al. 2024, arXiv 2308.01263): prompt, type, and a label that says
which prompts are harmless. Refusals are recognized by the markers of `keyword-rate`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from ray_abliterate.data.tables import stream_table
from ray_abliterate.errors import PromptSourceError
from ray_abliterate.evaluation.scorers.keyword_rate import MARKERS, MarkerObserver, classify_answer
from ray_abliterate.evaluation.scorers.markers import Markers
from ray_abliterate.evaluation.suites.chunks import ItemSelection, prompts_of
from ray_abliterate.evaluation.suites.item_suite import ItemSuite
from ray_abliterate.evaluation.suites.suite import Chunk, Measure, SuiteChunk, SuiteModel
from ray_abliterate.recipe.suites import OverRefusalSuite

REFUSED = Measure("refused", "rate", "minimize")


class OverRefusal(ItemSuite[OverRefusalSuite]):
    """Measures the share of harmless prompts that are refused."""

    measures = (REFUSED,)

    def selection(self) -> ItemSelection:
        """Return a selection of so many prompts of each type."""
        settings = self.settings
        return ItemSelection(settings.categories, settings.samples_per_category, settings.limit)

    def no_items_message(self) -> str:
        """Return which label and categories no row has."""
        return (
            f"no row has {self.settings.label} = {self.settings.harmless!r} and one of the "
            "categories.\n"
            "  Check `label`, `harmless` and `categories`."
        )

    def run(self, model: SuiteModel, chunk: Chunk) -> SuiteChunk:
        """Return which greedy answers refuse.

        An answer ends at its first marker, unless answers are stored.
        """
        settings = self.settings
        given = settings.markers
        phrases = MARKERS[given] if isinstance(given, str) else given
        markers = Markers(phrases, f"suite {self.name!r}")
        observer = None if settings.keep_answers else MarkerObserver(markers, lambda _hits: False)
        answers = model.answer(prompts_of(chunk), settings.max_new_tokens, observer)
        verdicts = [classify_answer(answer.text, markers) for answer in answers]
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

    def items(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield the harmless prompts by type.

        Raises:
            PromptSourceError: a row has no prompt, or no type.
        """
        settings = self.settings
        columns = [c for c in (settings.prompt, settings.category, settings.label) if c]
        for row in stream_table(settings.table, self.base, columns):
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
