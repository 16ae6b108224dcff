"""Measures how well a judge recognizes refusals, and which threshold is best, on labelled texts.

Pure values, but for reading the texts. Knows nothing about how exchanges are judged.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ray_abliterate.data.tables import stream_table
from ray_abliterate.errors import PromptSourceError, ScoreError
from ray_abliterate.evaluation.judges.judge import Exchange, Judge
from ray_abliterate.recipe import TableSource

LABELS = {"refusal": True, "answer": False, "true": True, "false": False, "1": True, "0": False}


@dataclass(frozen=True)
class ThresholdPoint:
    """Precision and recall of one threshold, from which on a text counts as a refusal.

    Attributes:
        threshold: The least probability that counts as a refusal.
        predicted: Texts that count as refusals.
        correct: Texts among those that are refusals.
        refusals: Texts that are refusals.
    """

    threshold: float
    predicted: int
    correct: int
    refusals: int

    @property
    def precision(self) -> float:
        """Return the share of refusals among the texts that count as refusals."""
        return self.correct / self.predicted if self.predicted else 1.0

    @property
    def recall(self) -> float:
        """Return the share of the refusals that count as refusals."""
        return self.correct / self.refusals

    @property
    def f1(self) -> float:
        """Return the harmonic mean of precision and recall."""
        return 2 * self.correct / (self.predicted + self.refusals)


@dataclass(frozen=True)
class Calibration:
    """A judge's precision-recall curve, and the markers of `keyword-rate` for comparison.

    Attributes:
        curve: Points from the highest threshold to the lowest.
        best: The point with the largest F1; of several the one with the highest threshold.
        markers: Points of the lists of markers, by name; their threshold means nothing.
        texts: Number of labelled texts.
        unknown: Texts that the judge could not decide on; they count nowhere.
    """

    curve: tuple[ThresholdPoint, ...]
    best: ThresholdPoint
    markers: dict[str, ThresholdPoint]
    texts: int
    unknown: int

    def lines(self) -> list[str]:
        """Return the curve as a table for people, with at most one row per 0.05 of recall."""
        head = f"{'threshold':>10} {'precision':>10} {'recall':>8} {'F1':>6}"
        rows, shown = [], -1.0
        for point in self.curve:
            if point.recall - shown < 0.05 and point not in (self.best, self.curve[-1]):
                continue
            shown = point.recall
            mark = "  <- best F1" if point == self.best else ""
            rows.append(f"{point.threshold:>10.4f} {_figures(point)}{mark}")
        baselines = [
            f"{name:>10} {_figures(point)}  (markers)" for name, point in self.markers.items()
        ]
        return [
            f"{self.texts} texts, {self.best.refusals} of them refusals; {self.unknown} unknown",
            head,
            *rows,
            *baselines,
            f"threshold = {self.best.threshold:.4f}",
        ]


def _figures(point: ThresholdPoint) -> str:
    return f"{point.precision:>10.3f} {point.recall:>8.3f} {point.f1:>6.3f}"


def read_labelled_texts(path: Path, with_prompts: bool = False) -> Iterator[tuple[Exchange, bool]]:
    """Yield answers and whether they refuse, from a JSONL file with `text` and `label`.

    Args:
        path: The file.
        with_prompts: Require the prompts too, as `prompt`.

    Raises:
        PromptSourceError: a row has no text, or a label that is none of `refusal`, `answer`, true,
            false, 1 and 0; the message names file, line and field.
    """
    source = TableSource(file=str(path))
    columns = ["text", "label", *(["prompt"] if with_prompts else [])]
    for row in stream_table(source, Path(), columns):
        text, label, prompt = (row.values.get(name) for name in ("text", "label", "prompt"))
        if not isinstance(text, str) or not text.strip():
            raise PromptSourceError(f"{row.place}: `text` is {text!r}, not an answer to judge.")
        refuses = LABELS.get(str(label).strip().casefold())
        if refuses is None:
            raise PromptSourceError(
                f"{row.place}: `label` is {label!r}; write `refusal` or `answer`, or true or false."
            )
        if with_prompts and not isinstance(prompt, str):
            raise PromptSourceError(f"{row.place}: `prompt` is {prompt!r}, not a prompt.")
        yield (str(prompt or ""), text), refuses


def calibrate(
    judge: Judge,
    texts: Sequence[tuple[Exchange, bool]],
    markers: Mapping[str, Callable[[str], bool]] | None = None,
) -> Calibration:
    """Judge labelled texts, and compare with the keyword scorer's markers on the same texts.

    Args:
        judge: The judge.
        texts: Prompts and answers, and whether they refuse.
        markers: Lists of markers by name, as functions that return whether a text holds one.

    Raises:
        ScoreError: the texts that the judge could decide on are all refusals, or none is.
    """
    judged = judge.judge([exchange for exchange, _ in texts])
    decided = [(p, label) for p, (_, label) in zip(judged, texts, strict=True) if p is not None]
    curve = precision_recall([p for p, _ in decided], [label for _, label in decided])
    best = max(curve, key=lambda point: (point.f1, point.threshold))
    baselines = {
        name: _by_markers(holds_marker, texts) for name, holds_marker in (markers or {}).items()
    }
    return Calibration(curve, best, baselines, len(texts), len(texts) - len(decided))


def precision_recall(
    probabilities: Sequence[float], labels: Sequence[bool]
) -> tuple[ThresholdPoint, ...]:
    """Return a point for every probability that occurs, from the highest down.

    Raises:
        ScoreError: there is no refusal, or nothing but refusals.
    """
    refusals = sum(labels)
    if not 0 < refusals < len(labels):
        raise ScoreError(
            f"{refusals} of {len(labels)} judged texts are refusals.\n"
            "  Add texts of the other kind: a curve needs refusals and answers."
        )
    points: list[ThresholdPoint] = []
    predicted = correct = 0
    ranked = sorted(zip(probabilities, labels, strict=True), key=lambda pair: -pair[0])
    for index, (probability, label) in enumerate(ranked):
        predicted, correct = predicted + 1, correct + label
        # texts of equal probability share one point
        if index + 1 == len(ranked) or ranked[index + 1][0] < probability:
            points.append(ThresholdPoint(probability, predicted, correct, refusals))
    return tuple(points)


def _by_markers(
    holds_marker: Callable[[str], bool], texts: Sequence[tuple[Exchange, bool]]
) -> ThresholdPoint:
    hits = [holds_marker(text) for (_, text), _ in texts]
    correct = sum(hit and label for hit, (_, label) in zip(hits, texts, strict=True))
    return ThresholdPoint(0.0, sum(hits), correct, sum(label for _, label in texts))
