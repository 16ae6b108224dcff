"""Multiple-choice questions: how they are read from a table, and how they make a prompt.

The layout is MMLU's (Hendrycks et al. 2021, arXiv 2009.03300): question, choices, the right one's
index or letter, category. Knows no models.

    Choose the right answer to the question. Reply with its letter alone.

    question of the first example
    A. choice
    B. choice
    Answer: B

    the question
    A. choice
    B. choice
    Answer:

All of it is one user turn. If texts are scored instead of letters, the turn has each example's
question and right answer on two lines, a blank line after them, and the question alone at the end.
"""

import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ray_abliterate.data.prompts import Prompt
from ray_abliterate.data.readers import TableRow
from ray_abliterate.errors import PromptSourceError
from ray_abliterate.recipe.suites import MultipleChoiceSuite

LETTERS = string.ascii_uppercase
TASK = "Choose the right answer to the question. Reply with its letter alone."

Item = Mapping[str, Any]


def read_question(row: TableRow, settings: MultipleChoiceSuite) -> tuple[str, dict[str, Any]]:
    """Return the category and the question of a row.

    Raises:
        PromptSourceError: a field is missing or impossible; the message names row and field.
    """
    question, choices = row.values[settings.question], row.values[settings.choices]
    if not isinstance(question, str) or not question.strip():
        raise _refused(row, settings.question, f"is {question!r}, not a question")
    if (
        not isinstance(choices, list)
        or not 2 <= len(choices) <= len(LETTERS)
        or not all(isinstance(text, str) and text.strip() for text in choices)
    ):
        raise _refused(
            row, settings.choices, f"is {choices!r}, not a list of 2 to {len(LETTERS)} texts"
        )
    answer = _answer_index(row.values[settings.answer], len(choices))
    if answer is None:
        last = len(choices) - 1
        raise _refused(
            row,
            settings.answer,
            f"is {row.values[settings.answer]!r}; the right answer is a number from 0 to {last}, "
            f"or a letter from A to {LETTERS[last]}",
        )
    category = row.values[settings.category] if settings.category else ""
    if not isinstance(category, str):
        raise _refused(row, settings.category, f"is {category!r}, not the name of a category")
    item = {"id": str(row.number), "question": question, "choices": choices, "answer": answer}
    return category, item


def _answer_index(answer: Any, choices: int) -> int | None:
    """Return the index, from 0, that an index or a letter stands for; None if it is neither."""
    if isinstance(answer, str):
        text = answer.strip().upper()
        if text.isdecimal():
            answer = int(text)
        else:
            answer = LETTERS.find(text) if len(text) == 1 else -1
    is_index = isinstance(answer, int) and not isinstance(answer, bool)
    return answer if is_index and 0 <= answer < choices else None


def _refused(row: TableRow, field: str, what: str) -> PromptSourceError:
    return PromptSourceError(f"{row.place}: `{field}` {what}.")


# Examples


def hold_out_examples(
    questions: Iterable[tuple[str, Item]], shots: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Make the first `shots` questions of each category examples for the others.

    The model is not asked these questions. Only the examples are held in memory.
    """
    by_category: dict[str, list[Item]] = {}
    for category, item in questions:
        examples = by_category.setdefault(category, [])
        if any(_same_question(item, example) for example in examples):
            continue
        if len(examples) < shots:
            examples.append(item)
            continue
        yield category, _with_examples(item, examples)


def with_examples_from(
    questions: Iterable[tuple[str, Item]],
    examples: Iterable[tuple[str, Item]],
    shots: int,
    categories: Sequence[str],
    name: str,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each question with the first `shots` examples of its category, the question excluded.

    Only `shots + 1` examples of each category are held in memory.

    Args:
        questions: Questions with their categories.
        examples: Questions of another table, with their categories.
        shots: Number of examples before each question.
        categories: Categories that are asked about; all if empty.
        name: Name of the suite, for errors.

    Raises:
        PromptSourceError: a category has too few examples.
    """
    by_category: dict[str, list[Item]] = {}
    for category, example in examples:
        known = by_category.setdefault(category, [])
        if len(known) <= shots and not any(_same_question(example, other) for other in known):
            known.append(example)
    for category, item in questions:
        if categories and category not in categories:
            continue
        known = by_category.get(category, [])
        others = [example for example in known if not _same_question(item, example)][:shots]
        if len(others) < shots:
            where = f"category {category!r}" if category else "the table of examples"
            raise PromptSourceError(
                f"suite {name!r}: {where} has {len(others)} examples, and shots = {shots}.\n"
                "  Lower `shots`, give `examples` with more, or leave `examples` unset to take "
                "them from `table`."
            )
        yield category, _with_examples(item, others)


def _same_question(one: Item, other: Item) -> bool:
    """Return whether two questions have the same words."""
    return bool(one["question"].split() == other["question"].split())


def _with_examples(item: Item, examples: Sequence[Item]) -> dict[str, Any]:
    without_ids = [{k: v for k, v in example.items() if k != "id"} for example in examples]
    return {**item, "examples": without_ids}


# Prompts


def letter_prompt(item: Item) -> Prompt:
    """Return the question with its choices, to be answered with a letter."""
    parts = [f"{_lettered(e)} {LETTERS[e['answer']]}" for e in item.get("examples", ())]
    return Prompt("\n\n".join([TASK, *parts, _lettered(item)]))


def text_prompt(item: Item) -> Prompt:
    """Return the question alone, to be answered with the text of a choice."""
    parts = [
        f"{e['question'].strip()}\n{e['choices'][e['answer']].strip()}"
        for e in item.get("examples", ())
    ]
    return Prompt("\n\n".join([*parts, item["question"].strip()]))


def _lettered(item: Item) -> str:
    choices = [f"{LETTERS[i]}. {text}" for i, text in enumerate(item["choices"])]
    return "\n".join([item["question"].strip(), *choices, "Answer:"])
