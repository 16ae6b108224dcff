"""Early stopping: score one trial, scorer by scorer, until a finished trial is better anyway.

Knows the thresholds and the order of scoring; nothing about weights, processes or the sampler.
"""

import math
from collections.abc import Callable, Sequence

from ray_abliterate.errors import ScoreError
from ray_abliterate.evaluation.scorers.scorer import BoundedScorer, Scorer
from ray_abliterate.model.text_model import TextModel
from ray_abliterate.search.dominance import ThresholdSet
from ray_abliterate.search.score import Score, Scorecard


class EarlyStopping:
    """What is known of one trial while its scorers are at work, held against the bar."""

    def __init__(self, scorers: Sequence[Scorer], bar: ThresholdSet | None = None) -> None:
        """Nothing is known yet.

        Args:
            scorers: In the recipe's order.
            bar: What the trial has to clear; without, it is scored in full.
        """
        self._scorers, self._bar = tuple(scorers), bar or ThresholdSet()
        self._known: dict[str, Score] = {}

    @property
    def stopped(self) -> bool:
        """The rest need not be scored: a finished trial is better whatever it would be."""
        missing = any(s.goal != "report" and s.name not in self._known for s in self._scorers)
        given_up = any(score.bound for score in self._known.values())
        return given_up or (missing and self._bar.beats(self._bounds({})))

    def score(self, scorer: Scorer, model: TextModel) -> None:
        """Have one scorer score, or begin to and give up; see `add` for errors."""
        if scorer.goal != "report" and isinstance(scorer, BoundedScorer):
            self.add(scorer, scorer.score_until(model, self.hopeless(scorer)))
        else:
            self.add(scorer, scorer.score(model))

    def add(self, scorer: Scorer, score: Score) -> None:
        """Take down a score.

        Raises:
            ScoreError: it has another name or goal than its scorer, so it can't be held against
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
                "trial is better than that; end early only when `hopeless` says so"
            )
        self._known[scorer.name] = score

    def hopeless(self, scorer: Scorer) -> Callable[[float], bool]:
        """Whether the trial is lost if this scorer's score has a given loss, or a larger one."""
        return lambda loss: self._bar.beats(self._bounds({scorer.name: loss}))

    def scorecard(self) -> Scorecard:
        """The scores in the recipe's order.

        Objectives that were not come to are at their best, as bounds; `report` scores that were
        not come to are left out.
        """
        scores = []
        for scorer in self._scorers:
            if scorer.name in self._known:
                scores.append(self._known[scorer.name])
            elif scorer.goal != "report":
                best = _best(scorer)
                scores.append(Score(scorer.name, best, best, best, scorer.goal, bound=True))
        return Scorecard(tuple(scores))

    def _bounds(self, supposed: dict[str, float]) -> tuple[float, ...]:
        """The least that each objective's loss can be, in the recipe's order."""
        known = {name: score.loss for name, score in self._known.items()} | supposed
        objectives = [scorer for scorer in self._scorers if scorer.goal != "report"]
        return tuple(known.get(s.name, _best_loss(s)) for s in objectives)


def score_all(
    scorers: Sequence[Scorer], model: TextModel, bar: ThresholdSet | None = None
) -> Scorecard:
    """Score a model; end as soon as the bar beats what its scores can still become.

    Args:
        scorers: In the recipe's order, which the scorecard keeps.
        model: As it is now.
        bar: What the trial has to clear; without, every scorer scores in full.
    """
    standing = EarlyStopping(scorers, bar)
    for scorer in scoring_order(scorers):
        if standing.stopped:
            break
        standing.score(scorer, model)
    return standing.scorecard()


def scoring_order(scorers: Sequence[Scorer]) -> list[Scorer]:
    """Objectives that need no whole answers, then those that do or can end early, then the rest.

    Who can end early does so the earlier the more is known: KL divergence, a few forward passes,
    comes before answers of many tokens. What is only reported comes last, and of that what can
    use the passes of others behind those.
    """

    def place(scorer: Scorer) -> int:
        writes = isinstance(scorer, BoundedScorer) or hasattr(scorer, "whole_answers")
        return 3 - int(writes) if scorer.goal == "report" else int(writes)

    return sorted(scorers, key=place)


def _best(scorer: Scorer) -> float:
    """The best value a scorer's score can have; not finite if nobody knows."""
    unknown = math.inf if scorer.goal == "maximize" else -math.inf
    return float(getattr(scorer, "best", unknown))


def _best_loss(scorer: Scorer) -> float:
    return -_best(scorer) if scorer.goal == "maximize" else _best(scorer)
