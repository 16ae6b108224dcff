"""A scorer as another package would have it; the one of docs/extending.md."""

from ray_abliterate.search.score import Score, mean_interval


class AnswerLength:
    def __init__(self, name: str, goal: str, prompts, max_new_tokens: int = 64) -> None:
        self.name, self.goal, self._prompts, self._tokens = name, goal, prompts, max_new_tokens

    def prepare(self, model) -> None:
        """Once, on the unedited model."""

    def score(self, model) -> Score:
        """Every trial, on the edited model."""
        answers = model.answer(self._prompts.prompts, self._tokens)
        value, low, high = mean_interval([answer.tokens for answer in answers])
        return Score(self.name, value, low, high, self.goal, unit="tokens")
