"""How well a judge tells refusals, on texts that people have labelled, and which threshold to use.

Pure values, but for reading the texts. Knows nothing about how is judged.
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
    """Precision and recall of refusals if what is at least so likely counts as one."""

    threshold: float
    found: int
    """Texts that are taken for refusals."""
    right: int
    """Those of them that are."""
    refusals: int
    """Texts that are refusals."""

    @property
    def precision(self) -> float:
        """Share of what is taken for refusals that is."""
        return self.right / self.found if self.found else 1.0

    @property
    def recall(self) -> float:
        """Share of refusals that is found."""
        return self.right / self.refusals

    @property
    def f1(self) -> float:
        """Harmonic mean of both."""
        return 2 * self.right / (self.found + self.refusals)


@dataclass(frozen=True)
class Calibration:
    """What came of it.

    Attributes:
        curve: From the highest threshold to the lowest.
        best: The point with the largest F1; of several the one with the highest threshold.
        markers: Of the keyword scorer's lists of markers, by name; their threshold means nothing.
        texts: Texts that were judged.
        unknown: Texts that the judge couldn't tell; in no figure.
    """

    curve: tuple[ThresholdPoint, ...]
    best: ThresholdPoint
    markers: dict[str, ThresholdPoint]
    texts: int
    unknown: int

    def lines(self) -> list[str]:
        """The curve as a table, for people; one row for each step of 0.05 in recall at most."""
        head = f"{'threshold':>10} {'precision':>10} {'recall':>8} {'F1':>6}"
        rows, shown = [], -1.0
        for point in self.curve:
            if point.recall - shown < 0.05 and point not in (self.best, self.curve[-1]):
                continue
            shown = point.recall
            mark = "  <- best F1" if point == self.best else ""
            rows.append(f"{point.threshold:>10.4f} {_figures(point)}{mark}")
        own = [f"{name:>10} {_figures(point)}  (markers)" for name, point in self.markers.items()]
        return [
            f"{self.texts} texts, {self.best.refusals} of them refusals; {self.unknown} unknown",
            head,
            *rows,
            *own,
            f"threshold = {self.best.threshold:.4f}",
        ]


def _figures(point: ThresholdPoint) -> str:
    return f"{point.precision:>10.3f} {point.recall:>8.3f} {point.f1:>6.3f}"


def read_labelled_texts(path: Path, with_prompts: bool = False) -> Iterator[tuple[Exchange, bool]]:
    """Answers and labels of a JSONL file with `text` and `label`.

    Args:
        path: The file.
        with_prompts: It has the prompts too, as `prompt`.

    Raises:
        PromptSourceError: a row has no text, or a label that is none of `refusal`, `answer`, true,
            false, 1 and 0; names file, line and field.
    """
    source = TableSource(file=str(path))
    columns = ["text", "label", *(["prompt"] if with_prompts else [])]
    for row in stream_table(source, Path(), columns):
        text, label, prompt = (row.values.get(name) for name in ("text", "label", "prompt"))
        if not isinstance(text, str) or not text.strip():
            raise PromptSourceError(f"{row.place}: `text` is {text!r}, not an answer to judge.")
        known = LABELS.get(str(label).strip().casefold())
        if known is None:
            raise PromptSourceError(
                f"{row.place}: `label` is {label!r}; write `refusal` or `answer`, or true or false."
            )
        if with_prompts and not isinstance(prompt, str):
            raise PromptSourceError(f"{row.place}: `prompt` is {prompt!r}, not a prompt.")
        yield (str(prompt or ""), text), known


def calibrate(
    judge: Judge,
    texts: Sequence[tuple[Exchange, bool]],
    markers: Mapping[str, Callable[[str], bool]] | None = None,
) -> Calibration:
    """Judge labelled texts, and hold the keyword scorer's markers against the same ones.

    Args:
        judge: Who judges.
        texts: Prompts and answers, with their labels.
        markers: Lists of markers by name.

    Raises:
        ScoreError: not both kinds of text are there, or the judge can't tell of enough.
    """
    judged = judge.judge([exchange for exchange, _ in texts])
    both = [(p, label) for p, (_, label) in zip(judged, texts, strict=True) if p is not None]
    curve = precision_recall([p for p, _ in both], [label for _, label in both])
    best = max(curve, key=lambda point: (point.f1, point.threshold))
    own = {name: _by_markers(holds_marker, texts) for name, holds_marker in (markers or {}).items()}
    return Calibration(curve, best, own, len(texts), len(texts) - len(both))


def precision_recall(
    probabilities: Sequence[float], labels: Sequence[bool]
) -> tuple[ThresholdPoint, ...]:
    """A point for every probability that occurs, from the highest down.

    Raises:
        ScoreError: there is no refusal, or nothing but refusals.
    """
    refusals = sum(labels)
    if not 0 < refusals < len(labels):
        raise ScoreError(
            f"{refusals} of {len(labels)} judged texts are refusals; a curve needs both kinds"
        )
    points: list[ThresholdPoint] = []
    found = right = 0
    ranked = sorted(zip(probabilities, labels, strict=True), key=lambda pair: -pair[0])
    for place, (probability, label) in enumerate(ranked):
        found, right = found + 1, right + label
        if place + 1 == len(ranked) or ranked[place + 1][0] < probability:
            points.append(ThresholdPoint(probability, found, right, refusals))
    return tuple(points)


def _by_markers(
    holds_marker: Callable[[str], bool], texts: Sequence[tuple[Exchange, bool]]
) -> ThresholdPoint:
    hits = [holds_marker(text) for (_, text), _ in texts]
    right = sum(hit and label for hit, (_, label) in zip(hits, texts, strict=True))
    return ThresholdPoint(0.0, sum(hits), right, sum(label for _, label in texts))
