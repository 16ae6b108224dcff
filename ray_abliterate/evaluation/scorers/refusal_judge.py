"""`refusal-judge`: the share of answers that a second model takes for refusals.

A second opinion beside `keyword-rate`, which counts answers that merely hold a marker, and misses
those that refuse in other words. Answers that the judge can't tell are in no denominator. Empty and
degenerate ones aren't shown to it: silence is not success.
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
    """See the module. The same prompts are answered greedily in every trial."""

    def __init__(self, settings: RefusalJudge, prompts: PromptSet, judge: Judge) -> None:
        self.name, self.goal = settings.name, settings.goal
        self.best = 1.0 if self.goal == "maximize" else 0.0
        self._settings, self._prompts, self._judge = settings, prompts, judge
        self._last: list[tuple[Prompt, Answer, bool]] = []

    @property
    def whole_answers(self) -> tuple[tuple[Prompt, ...], int]:
        """What it reads to the end; see `shared_answers`."""
        return self._prompts.prompts, self._settings.max_new_tokens

    def hears(self, prompt: Prompt, answer: Answer) -> None:
        """Have an answer judged while others are written, by a judge that works elsewhere."""
        if isinstance(self._judge, PrefetchingJudge) and not _is_broken(answer.text):
            self._judge.prefetch((prompt.user, answer.text))

    def prepare(self, model: TextModel) -> None:
        """Let the model see the prompts, so that it can reuse what the base model computes."""
        self.score(model)

    def score(self, model: TextModel) -> Score:
        """The rate among answers that are known, with its Wilson interval.

        Raises:
            ScoreError: no answer can be judged; or the judge fails, which says nothing about the
                model.
        """
        answers, judged, broken = self._judged(model)
        verdicts = [
            self._of_broken() if bad else verdict
            for verdict, bad in zip(judged, broken, strict=True)
        ]
        known = [verdict for verdict in verdicts if verdict is not None]
        if not known:
            raise ScoreError(f"{self.name}: the judge can't tell of any of {len(verdicts)} answers")
        self._last = [
            (prompt, answer, verdict)
            for prompt, answer, verdict in zip(
                self._prompts.prompts, answers, verdicts, strict=True
            )
            if verdict is not None
        ]
        hits, total = sum(known), len(known)
        low, high = wilson(hits, total)
        detail = {
            "hits": hits,
            "total": total,
            "unknown": len(verdicts) - total,
            "empty or degenerate": sum(broken),
        }
        return Score(self.name, hits / total, low, high, self.goal, "", detail)

    def shows(self, model: TextModel) -> list[bool | None]:
        """See `BehaviourTest`."""
        return self._judged(model)[1]

    def _judged(self, model: TextModel) -> tuple[list[Answer], list[bool | None], list[bool]]:
        """Answers, what the judge says of them, and which are not shown to it."""
        prompts = self._prompts.prompts
        answers = model.answer(prompts, self._settings.max_new_tokens)
        broken = [_is_broken(answer.text) for answer in answers]
        shown = [
            (prompt.user, answer.text)
            for prompt, answer, bad in zip(prompts, answers, broken, strict=True)
            if not bad
        ]
        judged = iter(self._judge.judge(shown) if shown else [])
        verdicts = [None if bad else self._verdict(next(judged)) for bad in broken]
        return answers, verdicts, broken

    def last_answers(self) -> Sequence[tuple[Prompt, Answer, bool]]:
        """Prompt, answer and verdict of the last score, where there is one."""
        return self._last

    def _of_broken(self) -> bool | None:
        return True if self._settings.empty_is_refusal else None

    def _verdict(self, probability: float | None) -> bool | None:
        return None if probability is None else probability >= self._settings.threshold


def _is_broken(text: str) -> bool:
    folded = fold(text)
    return not any(character.isalnum() for character in folded) or is_degenerate(folded)
