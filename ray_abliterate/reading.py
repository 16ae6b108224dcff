"""One long text through one model, wherever: how it is read, and stretches of it.

All replicas read a text in the same way, which one of them chooses; so a stretch is the same
whoever reads it.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ray_abliterate.errors import EvaluationError
from ray_abliterate.model import LanguageModel
from ray_abliterate.streaming import Carry, ChunkResult, StreamingEvaluator
from ray_abliterate.streaming.opening import open_source
from ray_abliterate.streaming.sources import TokenSource
from ray_abliterate.streaming.stream import refuse_short

STRETCH = 16
"""Independent chunks that are read in one go."""
WARM_SHARE = 8
"""A stretch is this many times as long as what is fed before it."""


@dataclass(frozen=True)
class Reading:
    """How a text is read; fields are those of `StreamingEvaluator`."""

    text: str
    carry: str | None = None
    chunk_size: int | None = None
    overlap: int | None = None
    window: int | None = None
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        """What can be known before a model is loaded.

        Raises:
            EvaluationError: the carry or the text can't be.
        """
        if self.carry is not None and self.carry not in list(Carry):
            raise EvaluationError(f"--carry {self.carry!r} is not one of: {', '.join(Carry)}.")
        if not self.text.startswith("hub:") and not Path(self.text).is_file():
            raise EvaluationError(
                f"--text {self.text!r} is not a file.\n"
                "  Give a file that exists, or hub:owner/name for a data set of the Hub."
            )

    def options(self) -> dict[str, Any]:
        """Arguments of the evaluator."""
        return {
            "carry": self.carry,
            "chunk_size": self.chunk_size,
            "overlap": self.overlap,
            "window": self.window,
            "max_tokens": self.max_tokens,
        }


@dataclass(frozen=True)
class Route:
    """What was chosen.

    Attributes:
        reading: With everything set.
        fingerprint: Of the text.
        tokens: Tokens of the text that count; None if nobody has counted them.
        chunks: Its chunks; None likewise.
        stretch: Chunks that are read in one go, by any replica; None if all are, by one. It follows
            from model and text alone, so that results don't depend on the number of replicas.
        notes: Why, where it was not the user who chose.
    """

    reading: Reading
    fingerprint: str
    tokens: int | None
    chunks: int | None
    stretch: int | None
    notes: tuple[str, ...]

    def pieces(self) -> tuple[tuple[int, int | None], ...]:
        """Number of the first chunk and how many, for each piece that is read in one go."""
        if self.stretch is None or self.chunks is None:
            return ((0, None),)
        starts = range(0, self.chunks, self.stretch)
        return tuple((first, min(self.stretch, self.chunks - first)) for first in starts)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {**asdict(self), "notes": list(self.notes)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Route":
        """The inverse of `to_json`."""
        own = {"reading": Reading(**values["reading"]), "notes": tuple(values["notes"])}
        return cls(**{**values, **own})


class Reader:
    """Reads texts with a model."""

    def __init__(self, model: LanguageModel) -> None:
        """Examine nothing yet."""
        self._model = model
        self._examined: StreamingEvaluator | None = None
        self._evaluators: dict[Reading, StreamingEvaluator] = {}

    def route(self, reading: Reading, count: bool) -> Route:
        """How the text is read.

        Args:
            reading: What is asked for.
            count: Read the text through, if need be, to know how long it is.

        Raises:
            EvaluationError: it can't be read so.
        """
        evaluator, text = self._evaluator(reading), self._open(reading)
        length, chosen = evaluator.length(text), reading
        if length is None and count:
            length = _counted(self._open(reading), reading.max_tokens)
        choice, chunks, stretch = evaluator.choose(length), None, None
        if length is not None:
            refuse_short(text.name, length, reading.chunk_size)
            geometry = choice.geometry
            one = length <= geometry.chunk_size
            size, overlap = (length, 0) if one else (geometry.chunk_size, geometry.overlap)
            chosen = replace(reading, chunk_size=size, overlap=overlap)
            chunks = geometry.chunks(length)
            warm = evaluator.warm_up(choice)
            if warm is not None:
                stretch = max(STRETCH, -(-WARM_SHARE * warm // geometry.stride))
        chosen = replace(chosen, carry=choice.carry.value, window=choice.window)
        return Route(chosen, text.fingerprint, length, chunks, stretch, choice.notes)

    def read(
        self, route: Route, first: int, count: int | None, state: Path | None = None
    ) -> Iterator[ChunkResult]:
        """Chunks of a text, one by one.

        Args:
            route: How it is read.
            first: Number of the first chunk that is wanted; earlier ones may come, too.
            count: How many; all there are if None.
            state: Where the model's state is saved now and then, if all are wanted.

        Raises:
            EvaluationError: a chunk can't be read.
        """
        evaluator, text = self._evaluator(route.reading), self._open(route.reading)
        if count is not None:
            yield from evaluator.stretch(text, first, count)
        else:
            here = state if state is not None and state.parent.is_dir() else None
            yield from evaluator.stream(text, state=here, first_wanted=first)

    def _evaluator(self, reading: Reading) -> StreamingEvaluator:
        if self._examined is None:
            self._examined = StreamingEvaluator(self._model)
        if reading not in self._evaluators:
            self._evaluators[reading] = self._examined.with_settings(**reading.options())
        return self._evaluators[reading]

    def _open(self, reading: Reading) -> TokenSource:
        return open_source(reading.text, self._model.chat.tokenizer)


def _counted(text: TokenSource, limit: int | None) -> int:
    """Tokens of a text, read through as far as they count."""
    found = 0
    for block in text.blocks():
        found += len(block)
        if limit is not None and found >= limit:
            return limit
    return found
