"""Models for tests of scorers, whose answers and logits are given."""

from collections.abc import Sequence

import torch

from ray_abliterate.data.prompts import Prompt
from ray_abliterate.model.text_model import Answer, AnswerObserver


class ScriptedModel:
    """A model that gives the answers and logits it is made with."""

    def __init__(self, *texts: str, logits: torch.Tensor | None = None) -> None:
        self.texts, self.logits = texts, logits
        self.asked: list[AnswerObserver | None] = []

    def answer(
        self, prompts: Sequence[Prompt], max_new_tokens: int, observer: AnswerObserver | None = None
    ) -> list[Answer]:
        """Return the answers at once."""
        self.asked.append(observer)
        return [Answer(text, 1, False) for text in self.texts]

    def tokens(self, text: str) -> list[int]:
        """Return a number below 7 for each character."""
        return [ord(character) % 7 for character in text]

    def next_token_logits(self, prompts: Sequence[Prompt]) -> torch.Tensor:
        """Return the given logits."""
        assert self.logits is not None
        return self.logits

    def continuation_logits(
        self, prompts: Sequence[Prompt], continuations: Sequence[Sequence[int]]
    ) -> list[torch.Tensor]:
        """Return the given logits of a prompt for each of its tokens."""
        assert self.logits is not None
        return [self.logits[i][None].expand(len(c), -1) for i, c in enumerate(continuations)]

    def continue_greedily(self, prompts: Sequence[Prompt], tokens: int) -> list[list[int]]:
        """Return zeros, more of them for later prompts."""
        return [[0] * (1 + i % tokens) for i in range(len(prompts))]


class ParallelModel(ScriptedModel):
    """A model that writes all answers word by word, side by side, as the observer allows."""

    ends_rows = True

    def answer(
        self, prompts: Sequence[Prompt], max_new_tokens: int, observer: AnswerObserver | None = None
    ) -> list[Answer]:
        """Write a word of each answer at a time."""
        self.asked.append(observer)
        written, decided = [""] * len(self.texts), [False] * len(self.texts)
        words = [text.split() for text in self.texts]
        for index in range(len(words) if observer is not None else 0):
            observer.begin(index)
        for step in range(max(map(len, words))):
            for index, of_answer in enumerate(words):
                if step < len(of_answer) and not decided[index]:
                    added = of_answer[step] + " "
                    written[index] += added
                    found = observer is not None and observer.read(index, added)
                    decided[index] = found and self.ends_rows
            if observer is not None and observer.enough():
                break
        return [
            Answer(text, len(text.split()), len(text.split()) < len(of_answer))
            for text, of_answer in zip(written, words, strict=True)
        ]


class SequentialModel:
    """A model that writes one answer after the other, and counts the words it has written."""

    def __init__(self, *texts: str) -> None:
        self.texts, self.written = texts, 0

    def answer(
        self, prompts: Sequence[Prompt], max_new_tokens: int, observer: AnswerObserver | None = None
    ) -> list[Answer]:
        """Write each answer word by word until the observer ends it."""
        answers = []
        for index, text in enumerate(self.texts):
            if observer is not None:
                observer.begin(index)
            written = ""
            for word in text.split(" "):
                if observer is not None and observer.enough():
                    break
                self.written += 1
                written += f"{word} "
                if observer is not None and observer.read(index, f"{word} "):
                    break
            answer = written.strip()
            answers.append(Answer(answer, len(answer.split()), answer != text))
        return answers

    def tokens(self, text: str) -> list[int]:
        """Return no tokens, and no logits either."""
        return []

    next_token_logits = continuation_logits = continue_greedily = tokens
