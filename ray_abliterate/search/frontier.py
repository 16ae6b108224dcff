"""Trials and their Pareto frontier: the trials that no other trial dominates.

Pure values; knows nothing about where trials come from.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ray_abliterate.search.plan import Plan
from ray_abliterate.search.score import Scorecard

SCORES, SECONDS, ERROR, SHARED, REPLICA = "scores", "seconds", "error", "shared", "replica"
"""Keys of a trial's result; its attributes in the study's journal have the same names."""


@dataclass(frozen=True)
class Trial:
    """One plan and its result. A failed trial has an error and no scorecard.

    A pruned trial is finished, but was stopped because another trial was better whatever came.

    Raises:
        ValueError: the trial has both a scorecard and an error, or neither.
    """

    number: int
    plan: Plan
    scorecard: Scorecard | None
    seconds: float
    error: str | None = None
    shared: bool = False
    """Whether it was scored in passes shared with other plans, by virtual edits, and not yet with
    edited weights."""
    replica: str = field(default="", compare=False)
    """The replica that scored it; not part of the result."""

    def __post_init__(self) -> None:
        if (self.scorecard is None) == (self.error is None):
            raise ValueError(f"trial {self.number} needs either a scorecard or an error")

    @property
    def pruned(self) -> bool:
        """Whether some of its scores are only bounds, because it was stopped early."""
        return self.scorecard is not None and self.scorecard.pruned

    @property
    def losses(self) -> tuple[float, ...]:
        """A finished trial's objectives, with signs such that smaller is better."""
        assert self.scorecard is not None
        return self.scorecard.losses

    def to_json(self) -> str:
        """Return the trial as one line of `trials.jsonl`."""
        scores = self.scorecard.to_list() if self.scorecard else None
        return json.dumps(
            {
                "number": self.number,
                "plan": json.loads(self.plan.to_json()),
                "scores": scores,
                "seconds": round(self.seconds, 3),
                "error": self.error,
                **({"shared": True} if self.shared else {}),
                **({"replica": self.replica} if self.replica else {}),
            },
            ensure_ascii=False,
        )

    @classmethod
    def from_json(cls, line: str) -> "Trial":
        """Parse a line of `trials.jsonl`."""
        values = json.loads(line)
        return cls(
            number=values["number"],
            plan=Plan.from_json(json.dumps(values["plan"])),
            scorecard=Scorecard.from_list(values["scores"]) if values["scores"] else None,
            seconds=values["seconds"],
            error=values["error"],
            shared=values.get("shared", False),
            replica=values.get("replica", ""),
        )


@dataclass(frozen=True)
class Frontier:
    """Trials none of which dominates another, in order of the first objective, then number.

    Of trials with equal losses the earliest is the member. Pruned trials are never members.
    """

    members: tuple[Trial, ...]

    @classmethod
    def of(cls, trials: Iterable[Trial]) -> "Frontier":
        """Return the frontier of the trials that were scored in full."""
        finished = sorted(
            (t for t in trials if t.scorecard is not None and not t.pruned),
            key=lambda t: (t.losses, t.number),
        )
        members: list[Trial] = []
        for trial in finished:
            if not any(weakly_dominates(member.losses, trial.losses) for member in members):
                members.append(trial)
        return cls(tuple(members))

    def __len__(self) -> int:
        return len(self.members)

    def __bool__(self) -> bool:
        return bool(self.members)

    @property
    def knee(self) -> Trial:
        """The member nearest to the best of every objective, each scaled to the frontier's span.

        Raises:
            ValueError: the frontier is empty.
        """
        if not self.members:
            raise ValueError("no trial finished, so there is no frontier")
        points = [member.losses for member in self.members]
        lows = [min(column) for column in zip(*points, strict=True)]
        spans = [
            max(c) - low or 1.0 for c, low in zip(zip(*points, strict=True), lows, strict=True)
        ]

        def distance(point: Sequence[float]) -> float:
            scaled = zip(point, lows, spans, strict=True)
            return float(sum(((x - low) / span) ** 2 for x, low, span in scaled))

        return min(self.members, key=lambda member: (distance(member.losses), member.number))

    def better_than(self, trial: Trial) -> Trial | None:
        """Return the first member that dominates a finished trial; None if none does."""
        return next((m for m in self.members if dominates(m.losses, trial.losses)), None)

    def hypervolume(self, reference: Sequence[float]) -> float:
        """Return the volume between the frontier and a reference point.

        Members that are not better than the reference in every objective add nothing.
        """
        points = [member.losses for member in self.members]
        return _volume([p for p in points if _below(p, reference)], tuple(reference))


def weakly_dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    """Return whether `a` is at least as good as `b` in every objective."""
    return all(x <= y for x, y in zip(a, b, strict=True))


def dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    """Return whether `a` is at least as good as `b` everywhere, and better somewhere."""
    return weakly_dominates(a, b) and any(x < y for x, y in zip(a, b, strict=True))


def _below(point: Sequence[float], reference: Sequence[float]) -> bool:
    return all(x < r for x, r in zip(point, reference, strict=True))


def _volume(points: list[tuple[float, ...]], reference: tuple[float, ...]) -> float:
    """Sweep over the first objective, with one dimension less in each slice.

    Exact; meant for the few points of a frontier.
    """
    if not points:
        return 0.0
    if len(reference) == 1:
        return reference[0] - min(point[0] for point in points)
    ordered = sorted(points)
    edges = [*(point[0] for point in ordered[1:]), reference[0]]
    total = 0.0
    for count, (point, edge) in enumerate(zip(ordered, edges, strict=True), start=1):
        if edge > point[0]:
            slice_points = [p[1:] for p in ordered[:count]]
            total += (edge - point[0]) * _volume(slice_points, reference[1:])
    return total
