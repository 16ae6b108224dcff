"""`refusal-judge`: the share of answers that a second model takes for refusals.

It is a second opinion on `keyword-rate`, which counts answers that merely hold a marker, and misses
those that refuse in other words. Answers that the judge can't decide on are in no denominator.
Empty and degenerate ones are not shown to it: silence is not success.
"""

from collections.abc import Sequence

from ray_abliterate.data.prompts import Prompt, PromptSet
from ray_abliterate.errors import ScoreError
from ray_abliterate.evaluation.judges.judge import Judge, PrefetchingJudge
from ray_abliterate.evaluation.scorers.keyword_rate import is_degenerate
from ray_abliterate.model.text_model import Answer, TextModel
from ray_abliterate.recipe import RefusalJudge
from ray_abliterate.recipe.text_folding import fold
from ray_abliterate.search.score import Score, wilson


class RefusalJudgeScorer:
    """Scores the share of refusals; the same prompts are answered greedily in every trial."""

    def __init__(self, settings: RefusalJudge, prompts: PromptSet, judge: Judge) -> None:
        self.name, self.goal = settings.name, settings.goal
        self.best = 1.0 if self.goal == "maximize" else 0.0
        self._settings, self._prompts, self._judge = settings, prompts, judge
        self._last: list[tuple[Prompt, Answer, bool]] = []

    @property
    def whole_answers(self) -> tuple[tuple[Prompt, ...], int]:
        """Return the prompts whose answers it reads to the end; see `WholeAnswerScorer`."""
        return self._prompts.prompts, self._settings.max_new_tokens

    def on_answer(self, prompt: Prompt, answer: Answer) -> None:
        """Have an answer judged while others are being written, by a judge in another process."""
        if isinstance(self._judge, PrefetchingJudge) and not _is_broken(answer.text):
            self._judge.prefetch((prompt.user, answer.text))

    def prepare(self, model: TextModel) -> None:
        """Let the model answer, so that it can reuse what the unedited model computes."""
        self.score(model)

    def score(self, model: TextModel) -> Score:
        """Return the rate among the answers that were judged, with its Wilson interval.

        Raises:
            ScoreError: no answer can be judged; or the judge fails, which says nothing about the
                model.
        """
        answers, judged, broken = self._judged(model)
        verdicts = [
            self._verdict_on_broken() if is_broken else verdict
            for verdict, is_broken in zip(judged, broken, strict=True)
        ]
        decided = [verdict for verdict in verdicts if verdict is not None]
        if not decided:
            raise ScoreError(
                f"{self.name}: the judge can't decide on any of {len(verdicts)} answers"
            )
        self._last = [
            (prompt, answer, verdict)
            for prompt, answer, verdict in zip(
                self._prompts.prompts, answers, verdicts, strict=True
            )
            if verdict is not None
        ]
        hits, total = sum(decided), len(decided)
        low, high = wilson(hits, total)
        detail = {
            "hits": hits,
            "total": total,
            "unknown": len(verdicts) - total,
            "empty or degenerate": sum(broken),
        }
        return Score(self.name, hits / total, low, high, self.goal, "", detail)

    def shows(self, model: TextModel) -> list[bool | None]:
        """Return the judge's verdict on each answer; None for broken and undecided ones."""
        return self._judged(model)[1]

    def _judged(self, model: TextModel) -> tuple[list[Answer], list[bool | None], list[bool]]:
        """Return the answers, the judge's verdicts, and which answers are too broken to judge."""
        prompts = self._prompts.prompts
        answers = model.answer(prompts, self._settings.max_new_tokens)
        broken = [_is_broken(answer.text) for answer in answers]
        shown = [
            (prompt.user, answer.text)
            for prompt, answer, is_broken in zip(prompts, answers, broken, strict=True)
            if not is_broken
        ]
        judged = iter(self._judge.judge(shown) if shown else [])
        verdicts = [None if is_broken else self._verdict(next(judged)) for is_broken in broken]
        return answers, verdicts, broken

    def last_answers(self) -> Sequence[tuple[Prompt, Answer, bool]]:
        """Return prompts, answers and verdicts of the last score, where there is a verdict."""
        return self._last

    def _verdict_on_broken(self) -> bool | None:
        return True if self._settings.empty_is_refusal else None

    def _verdict(self, probability: float | None) -> bool | None:
        return None if probability is None else probability >= self._settings.threshold


def _is_broken(text: str) -> bool:
    """Return whether an answer is empty or degenerate, so that no judge should see it."""
    folded = fold(text)
    return not any(character.isalnum() for character in folded) or is_degenerate(folded)
