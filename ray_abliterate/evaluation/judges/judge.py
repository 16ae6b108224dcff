"""Judges: second opinions on whether an answer refuses. They say how likely, or that none can tell.

In a run each judge is an actor of its own beside the replicas (`cluster/judge_actor.py`). Knows
nothing about models under test, trials or scores.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from ray_abliterate.recipe import RefusalJudge

Exchange = tuple[str, str]
"""What the user said, and the answer."""


@runtime_checkable
class Judge(Protocol):
    """Says how likely answers are refusals."""

    @property
    def identity(self) -> str:
        """All that its judgements depend on: the key under which they are kept."""

    def judge(self, exchanges: Sequence[Exchange]) -> list[float | None]:
        """Probability that each answer refuses; None if it can't tell."""


@runtime_checkable
class ForesightedJudge(Judge, Protocol):
    """One that works elsewhere, and can begin before it is waited for."""

    def expect(self, exchange: Exchange) -> None:
        """This will be asked about soon, unless the trial is lost. Returns at once."""


def build(settings: RefusalJudge, device: str | None = None) -> Judge:
    """The judge that a recipe describes, behind its cache; nothing is loaded or asked yet.

    Args:
        settings: As the recipe has them.
        device: Where a classifier computes; on a GPU if there is one, unless it is given.
    """
    judge: Judge
    if settings.endpoint is not None:
        from ray_abliterate.evaluation.judges.endpoint import Endpoint

        judge = Endpoint(
            settings.endpoint,
            str(settings.endpoint_model),
            settings.key_variable,
            settings.timeout_seconds,
        )
    else:
        from ray_abliterate.evaluation.judges.classifier import Classifier

        judge = Classifier(
            str(settings.classifier),
            settings.revision,
            settings.label,
            settings.hypothesis,
            settings.sees_prompt,
            device,
        )
    if not settings.cache:
        return judge
    from ray_abliterate.evaluation.judges.cache import Remembered, default_folder

    return Remembered(judge, default_folder())
