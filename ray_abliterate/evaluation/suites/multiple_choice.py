"""`multiple-choice`: the share of questions to which the model finds the right answer likeliest.

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
"""The probability of all letters together: if it is near 0, the model does not answer in letters,
and its accuracy says little."""


class MultipleChoice(ItemSuite[MultipleChoiceSuite]):
    """Measures accuracy, by letters or by the texts of the choices."""

    def __init__(self, settings: MultipleChoiceSuite, base: Path = Path()) -> None:
        """
        Args:
            settings: The suite's section of the recipe.
            base: The recipe's folder.
        """
        super().__init__(settings, base)
        letters = settings.scoring == "letters"
        self.measures = (CORRECT, LETTER_MASS) if letters else (CORRECT,)

    def selection(self) -> ItemSelection:
        """Return a selection of so many questions of each category."""
        settings = self.settings
        return ItemSelection(settings.categories, settings.samples_per_category, settings.limit)

    def no_items_message(self) -> str:
        """Return that no question is of the categories."""
        return "the table has no question of these categories.\n  Check `categories`."

    def run(self, model: SuiteModel, chunk: Chunk) -> SuiteChunk:
        """Return 1 for each question whose right choice is the likeliest, otherwise 0."""
        if self.settings.scoring == "letters":
            scores, mass = letter_scores(model, chunk.items)
        else:
            scores, mass = text_scores(model, chunk.items), []
        correct = [
            float(max(range(len(each)), key=each.__getitem__) == item["answer"])
            for each, item in zip(scores, chunk.items, strict=True)
        ]
        values: dict[str, Sequence[float]] = {CORRECT.name: correct}
        if mass:
            values[LETTER_MASS.name] = mass
        return SuiteChunk.of(chunk, values)

    def items(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield questions by category, with examples before them if there are `shots`.

        Raises:
            PromptSourceError: a row is no question, or a category has too few examples.
        """
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
    """Return the log-probability of each choice's letter, and the probability of all letters.

    Raises:
        ScoreError: the tokenizer can't distinguish the letters, or logits are NaN.
    """
    most = max(len(item["choices"]) for item in items)
    tokens = letter_tokens(model, most)
    logits = model.next_token_logits([letter_prompt(item) for item in items])
    log_probs = torch.log_softmax(_refuse_nan(logits).double(), dim=-1)  # (question, vocab)
    scores, mass = [], []
    for row, item in zip(log_probs, items, strict=True):
        choices = range(len(item["choices"]))
        letters = torch.stack([row[list(tokens[i])].logsumexp(0) for i in choices])
        scores.append(letters.tolist())
        mass.append(min(1.0, float(letters.exp().sum())))
    return scores, mass


def letter_tokens(model: SuiteModel, count: int) -> list[tuple[int, ...]]:
    """Return the tokens that spell each letter alone, at an answer's beginning or after a blank.

    Raises:
        ScoreError: a letter has no token of its own.
    """
    by_letter = []
    for letter in LETTERS[:count]:
        spellings = [model.tokens(text) for text in (letter, f" {letter}")]
        by_letter.append(tuple(sorted({ids[0] for ids in spellings if len(ids) == 1})))
    flat = [token for tokens in by_letter for token in tokens]
    if not all(by_letter) or len(set(flat)) < len(flat):
        raise ScoreError(
            f"the tokenizer has no tokens of their own for the letters A to {LETTERS[count - 1]}.\n"
            '  Set scoring = "text" for this suite.'
        )
    return by_letter


def text_scores(model: SuiteModel, items: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """Return the log-likelihood of each choice's text, per byte, in batches of limited memory.

    Raises:
        ScoreError: logits are NaN.
    """
    pairs = [(text_prompt(item), text) for item in items for text in item["choices"]]
    tokens = [model.tokens(text.strip()) for _, text in pairs]
    log_likelihoods: list[float] = []
    for start, stop in _slices([len(ids) for ids in tokens], TOKENS_AT_ONCE):
        prompts = [prompt for prompt, _ in pairs[start:stop]]
        answers = tokens[start:stop]
        for ids, logits in zip(answers, model.continuation_logits(prompts, answers), strict=True):
            log_probs = torch.log_softmax(_refuse_nan(logits).double(), dim=-1)  # (token, vocab)
            log_likelihoods.append(float(log_probs[range(len(ids)), ids].sum()))
    scores, first = [], 0
    for item in items:
        lengths = [len(text.strip().encode()) for text in item["choices"]]
        of_item = log_likelihoods[first : first + len(lengths)]
        scores.append([value / length for value, length in zip(of_item, lengths, strict=True)])
        first += len(lengths)
    return scores


def _slices(lengths: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """Yield runs of neighbours whose lengths add up to at most `most`, or of a single one."""
    start = total = 0
    for index, length in enumerate(lengths):
        if index > start and total + length > most:
            yield start, index
            start, total = index, 0
        total += length
    if lengths:
        yield start, len(lengths)


def _refuse_nan(logits: Tensor) -> Tensor:
    if logits.isnan().any():
        raise ScoreError("the model's logits are NaN: the edit has broken it")
    return logits
