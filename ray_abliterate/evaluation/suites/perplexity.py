"""`perplexity`: how well the model predicts texts, each on its own; no chat template, no prompt.

    loss = -(1/T) Σ_t log p(x_t | x_<t)      over the first tokens of each text

Values are nats per token of each text, so that two models are compared text by text. Over all
tokens together, `perplexity` is exp(nats / tokens), and `bits_per_byte` does not depend on the
tokenizer. For one long text, and what is carried through it, see
`ray_abliterate.evaluation.streaming`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ray_abliterate.data.tables import stream_table
from ray_abliterate.errors import PromptSourceError, ScoreError
from ray_abliterate.evaluation.streaming.results import perplexity
from ray_abliterate.evaluation.streaming.runners import ModuleRunner
from ray_abliterate.evaluation.suites.item_suite import ItemSuite
from ray_abliterate.evaluation.suites.suite import Chunk, Measure, SuiteChunk, SuiteModel
from ray_abliterate.model.language_model import LanguageModel
from ray_abliterate.recipe.suites import PerplexitySuite
from ray_abliterate.search.score import Score

LOSS = Measure("loss", "mean", "minimize", "nats per token")


class Perplexity(ItemSuite[PerplexitySuite]):
    """Measures the loss of texts, from which perplexity and bits per byte follow."""

    measures = (LOSS,)

    def no_items_message(self) -> str:
        """Return which column has no text that is long enough."""
        return (
            f"no row has {self.settings.least_characters} characters in column "
            f"{self.settings.column!r}.\n  Check `column` and `least_characters`."
        )

    def run(self, model: SuiteModel, chunk: Chunk) -> SuiteChunk:
        """Return the mean loss of each text's first tokens; a text of one token has none.

        Raises:
            ScoreError: the model is not a `LanguageModel`.
        """
        if not isinstance(model, LanguageModel):
            raise ScoreError(
                f"suite {self.name!r} needs a LanguageModel, not {type(model).__name__}"
            )
        runner, tokenizer = ModuleRunner(model.module), model.chat.tokenizer
        values: list[float | None] = []
        tokens, size, nats = 0, 0, []
        for item in chunk.items:
            ids = _ids(tokenizer, item["text"], self.settings.tokens)
            if len(ids) < 2:
                values.append(None)
                continue
            runner.begin()
            losses = runner.feed(ids[:-1], ids[1:]).double()
            values.append(float(losses.mean()))
            nats += losses.tolist()
            tokens += len(losses)
            size += len(tokenizer.decode(ids[1:].tolist()).encode())
        return SuiteChunk.of(
            chunk, {LOSS.name: values}, {"tokens": tokens, "bytes": size}, {"nats": math.fsum(nats)}
        )

    def summary(self, chunks: Sequence[SuiteChunk]) -> tuple[Score, ...]:
        """Return the mean over texts; `detail` has perplexity and bits per byte over all tokens."""
        main, *others = super().summary(chunks)
        nats, tokens, size = (main.detail[name] for name in ("nats", "tokens", "bytes"))
        derived = {
            "perplexity": perplexity(nats / max(tokens, 1)),
            "bits_per_byte": nats / math.log(2) / max(size, 1),
        }
        return (replace(main, detail={**main.detail, **derived}), *others)

    def items(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield the texts that are long enough."""
        column = self.settings.column
        for row in stream_table(self.settings.table, self.base, [column]):
            text = row.values[column]
            if not isinstance(text, str):
                raise PromptSourceError(f"{row.place}: `{column}` is {text!r}, not a text.")
            if len(text) >= self.settings.least_characters:
                yield "", {"id": str(row.number), "text": text}


def _ids(tokenizer: Any, text: str, most: int) -> torch.Tensor:
    """Return a text's first tokens, `"token"`; characters beyond any of them are not tokenized."""
    ids = tokenizer(text[: 32 * most], add_special_tokens=True)["input_ids"][:most]
    return torch.tensor(ids, dtype=torch.long)
