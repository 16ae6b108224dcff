"""Early stopping: score one trial, scorer by scorer, until a finished trial is better anyway.

Knows the thresholds and the order of scoring; nothing about weights, processes or the sampler.
`search/dominance.py` proves that stopping never changes a frontier.
"""

import math
from collections.abc import Callable, Sequence

from ray_abliterate.errors import ScoreError
from ray_abliterate.evaluation.scorers.scorer import BoundedScorer, Scorer
from ray_abliterate.model.text_model import TextModel
from ray_abliterate.search.dominance import ThresholdSet
from ray_abliterate.search.score import Score, Scorecard


class EarlyStopping:
    """The scores of one trial while its scorers work, compared with the thresholds."""

    def __init__(self, scorers: Sequence[Scorer], thresholds: ThresholdSet | None = None) -> None:
        """Begin with no score known.

        Args:
            scorers: The recipe's scorers, in its order.
            thresholds: What the trial must beat; None scores the trial in full.
        """
        self._scorers, self._thresholds = tuple(scorers), thresholds or ThresholdSet()
        self._scores: dict[str, Score] = {}

    @property
    def stopped(self) -> bool:
        """Whether the rest need not be scored: a finished trial is better whatever it would be."""
        missing = any(s.goal != "report" and s.name not in self._scores for s in self._scorers)
        given_up = any(score.bound for score in self._scores.values())
        return given_up or (missing and self._thresholds.beats(self._bounds({})))

    def score(self, scorer: Scorer, model: TextModel) -> None:
        """Let one scorer score the model, to the end or until it is hopeless.

        Raises:
            ScoreError: the score does not belong to the scorer; see `add`.
        """
        if scorer.goal != "report" and isinstance(scorer, BoundedScorer):
            self.add(scorer, scorer.score_until(model, self.hopeless(scorer)))
        else:
            self.add(scorer, scorer.score(model))

    def add(self, scorer: Scorer, score: Score) -> None:
        """Record a score.

        Raises:
            ScoreError: it has another name or goal than its scorer, so it can't be compared with
                others; or it is a bound, although no finished trial is better than that.
        """
        if (score.name, score.goal) != (scorer.name, scorer.goal):
            raise ScoreError(
                f"{scorer.name}: the scorer's goal is {scorer.goal!r}, but its score is "
                f"{score.name!r} with goal {score.goal!r}; give it the scorer's name and goal"
            )
        if score.bound and not self.hopeless(scorer)(score.loss):
            raise ScoreError(
                f"{scorer.name}: the score {score.value:g} is only a bound, although no finished "
                "trial is better than that; stop early only when `hopeless` returns True"
            )
        self._scores[scorer.name] = score

    def hopeless(self, scorer: Scorer) -> Callable[[float], bool]:
        """Return the test whether the trial is lost once this scorer's loss is at least a value."""
        return lambda loss: self._thresholds.beats(self._bounds({scorer.name: loss}))

    def scorecard(self) -> Scorecard:
        """Return the scores in the recipe's order.

        Objectives that were not reached have their best value, as a bound; `report` scores that
        were not reached are left out.
        """
        scores = []
        for scorer in self._scorers:
            if scorer.name in self._scores:
                scores.append(self._scores[scorer.name])
            elif scorer.goal != "report":
                best = _best(scorer)
                scores.append(Score(scorer.name, best, best, best, scorer.goal, bound=True))
        return Scorecard(tuple(scores))

    def _bounds(self, assumed: dict[str, float]) -> tuple[float, ...]:
        """Return the least that each objective's loss can be, in the recipe's order."""
        known = {name: score.loss for name, score in self._scores.items()} | assumed
        objectives = [scorer for scorer in self._scorers if scorer.goal != "report"]
        return tuple(known.get(s.name, _best_loss(s)) for s in objectives)


def score_all(
    scorers: Sequence[Scorer], model: TextModel, thresholds: ThresholdSet | None = None
) -> Scorecard:
    """Score a model; stop as soon as a threshold beats whatever its scores can still become.

    Args:
        scorers: The recipe's scorers, in its order, which the scorecard keeps.
        model: The model as it is now.
        thresholds: What the trial must beat; None scores the trial in full.
    """
    trial = EarlyStopping(scorers, thresholds)
    for scorer in scoring_order(scorers):
        if trial.stopped:
            break
        trial.score(scorer, model)
    return trial.scorecard()


def scoring_order(scorers: Sequence[Scorer]) -> list[Scorer]:
    """Sort scorers: objectives without answers, then those that need answers, then reports.

    A scorer that can stop early stops the earlier the more is known: KL divergence, a few forward
    passes, comes before answers of many tokens. What is only reported comes last, and of that
    whatever can use the passes of others comes behind those.
    """

    def rank(scorer: Scorer) -> int:
        writes_answers = isinstance(scorer, BoundedScorer) or hasattr(scorer, "whole_answers")
        return 3 - int(writes_answers) if scorer.goal == "report" else int(writes_answers)

    return sorted(scorers, key=rank)


def _best(scorer: Scorer) -> float:
    """Return the best value that a scorer's score can have; infinite if it is unknown."""
    unknown = math.inf if scorer.goal == "maximize" else -math.inf
    return float(getattr(scorer, "best", unknown))


def _best_loss(scorer: Scorer) -> float:
    return -_best(scorer) if scorer.goal == "maximize" else _best(scorer)
