"""`multiple-choice`: the share of questions whose right answer the model finds likeliest.

The layout of a table, and of a prompt, is in `multiple_choice_prompt.py`.

    letters:   argmax_i  log Σ_v p(v | prompt)        v: tokens that spell letter i, with or without
                                                      a blank before it
    text:      argmax_i  (1 / bytes_i) Σ_t log p(token t of choice i | prompt, tokens before)

`letters` is one forward pass of the prompt; `text` one pass for each choice, in which the letters
aren't shown.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ray_abliterate.data.tables import stream_table
from ray_abliterate.errors import ScoreError
from ray_abliterate.evaluation.suites.chunks import ItemSelection
from ray_abliterate.evaluation.suites.item_suite import ItemSuite
from ray_abliterate.evaluation.suites.multiple_choice_prompt import (
    LETTERS,
    hold_out_examples,
    letter_prompt,
    read_question,
    text_prompt,
    with_examples_from,
)
from ray_abliterate.evaluation.suites.suite import Chunk, Measure, SuiteChunk, SuiteModel
from ray_abliterate.recipe import TableSource
from ray_abliterate.recipe.suites import MultipleChoiceSuite

TOKENS_AT_ONCE = 256
"""Tokens of answers whose logits are in memory at once: 156 MB for a vocabulary of 152,000."""

CORRECT = Measure("correct", "rate", "maximize")
LETTER_MASS = Measure("letter-mass", "mean", "report", "probability")
"""What probability all letters have together: near 0, the model does not answer in letters, and its
accuracy says little."""


class MultipleChoice(ItemSuite[MultipleChoiceSuite]):
    """See the module."""

    def __init__(self, settings: MultipleChoiceSuite, base: Path = Path()) -> None:
        """See `ItemSuite`."""
        super().__init__(settings, base)
        letters = settings.scoring == "letters"
        self.measures = (CORRECT, LETTER_MASS) if letters else (CORRECT,)

    def choice(self) -> ItemSelection:
        """So many of each category."""
        settings = self.settings
        return ItemSelection(settings.categories, settings.samples_per_category, settings.limit)

    def nothing(self) -> str:
        """See `ItemSuite`."""
        return "the table has no question of the categories.\n  Check `categories`."

    def run(self, model: SuiteModel, chunk: Chunk) -> SuiteChunk:
        """Which choice is likeliest, for each question; 1 if it is the right one."""
        if self.settings.scoring == "letters":
            scores, mass = letter_scores(model, chunk.items)
        else:
            scores, mass = text_scores(model, chunk.items), []
        correct = [
            float(max(range(len(own)), key=own.__getitem__) == item["answer"])
            for own, item in zip(scores, chunk.items, strict=True)
        ]
        values: dict[str, Sequence[float]] = {CORRECT.name: correct}
        if mass:
            values[LETTER_MASS.name] = mass
        return SuiteChunk.of(chunk, values)

    def items(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Questions, by category, with examples where there are `shots`."""
        settings = self.settings
        columns = [settings.question, settings.choices, settings.answer]
        columns += [settings.category] if settings.category else []

        def read(table: TableSource) -> Iterator[tuple[str, Mapping[str, Any]]]:
            for row in stream_table(table, self.base, columns):
                yield read_question(row, settings)

        if not settings.shots:
            return read(settings.table)
        if settings.examples is None:
            return hold_out_examples(read(settings.table), settings.shots)
        return with_examples_from(
            read(settings.table),
            read(settings.examples),
            settings.shots,
            settings.categories,
            self.name,
        )


def letter_scores(
    model: SuiteModel, items: Sequence[Mapping[str, Any]]
) -> tuple[list[list[float]], list[float]]:
    """Log-probability of each choice's letter, and what all letters of a question have together.

    Raises:
        ScoreError: the tokenizer can't tell the letters apart, or logits are not numbers.
    """
    most = max(len(item["choices"]) for item in items)
    tokens = letter_tokens(model, most)
    logits = model.next_token_logits([letter_prompt(item) for item in items])
    logs = torch.log_softmax(_sound(logits).double(), dim=-1)
    scores, mass = [], []
    for row, item in zip(logs, items, strict=True):
        own = torch.stack([row[list(tokens[i])].logsumexp(0) for i in range(len(item["choices"]))])
        scores.append(own.tolist())
        mass.append(min(1.0, float(own.exp().sum())))
    return scores, mass


def letter_tokens(model: SuiteModel, count: int) -> list[tuple[int, ...]]:
    """The tokens that spell each letter alone, at the beginning of an answer or after a blank.

    Raises:
        ScoreError: a letter has no token of its own.
    """
    found = []
    for letter in LETTERS[:count]:
        spelt = [model.tokens(text) for text in (letter, f" {letter}")]
        found.append(tuple(sorted({ids[0] for ids in spelt if len(ids) == 1})))
    every = [token for tokens in found for token in tokens]
    if not all(found) or len(set(every)) < len(every):
        raise ScoreError(
            f"the tokenizer has no tokens of their own for the letters A to {LETTERS[count - 1]}.\n"
            '  Set scoring = "text" for this suite.'
        )
    return found


def text_scores(model: SuiteModel, items: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """Log-likelihood of each choice's text, per byte; few answers in memory at a time.

    Raises:
        ScoreError: logits are not numbers.
    """
    asked = [(text_prompt(item), text) for item in items for text in item["choices"]]
    tokens = [model.tokens(text.strip()) for _, text in asked]
    found: list[float] = []
    for start, stop in _slices([len(ids) for ids in tokens], TOKENS_AT_ONCE):
        prompts = [prompt for prompt, _ in asked[start:stop]]
        answers = tokens[start:stop]
        for ids, logits in zip(answers, model.continuation_logits(prompts, answers), strict=True):
            logs = torch.log_softmax(_sound(logits).double(), dim=-1)
            found.append(float(logs[range(len(ids)), ids].sum()))
    scores, place = [], 0
    for item in items:
        lengths = [len(text.strip().encode()) for text in item["choices"]]
        own = found[place : place + len(lengths)]
        scores.append([value / length for value, length in zip(own, lengths, strict=True)])
        place += len(lengths)
    return scores


def _slices(lengths: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """Runs of neighbours whose lengths add up to `most` at most, or that are alone."""
    start = total = 0
    for place, length in enumerate(lengths):
        if place > start and total + length > most:
            yield start, place
            start, total = place, 0
        total += length
    if lengths:
        yield start, len(lengths)


def _sound(logits: Tensor) -> Tensor:
    if logits.isnan().any():
        raise ScoreError("the model's logits are NaN: the edit has broken it")
    return logits
