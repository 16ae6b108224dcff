"""One long text through one model, wherever: how it is read, and stretches of it.

All replicas read a text in the same way, which one of them chooses; so a stretch is the same
whoever reads it.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ray_abliterate.errors import EvaluationError
from ray_abliterate.evaluation.streaming.carry_choice import StreamingSettings, parse_carry
from ray_abliterate.evaluation.streaming.evaluator import StreamingEvaluator
from ray_abliterate.evaluation.streaming.hidden_state_cache import HiddenStateCache
from ray_abliterate.evaluation.streaming.open_source import open_source
from ray_abliterate.evaluation.streaming.results import ChunkResult
from ray_abliterate.evaluation.streaming.stream import refuse_short
from ray_abliterate.evaluation.streaming.token_sources import TokenSource
from ray_abliterate.model.language_model import LanguageModel

STRETCH = 16
"""Independent chunks that are read in one go."""
WARM_SHARE = 8
"""A stretch is this many times as long as what is fed before it."""


@dataclass(frozen=True)
class TextRequest:
    """How a text is read; fields are those of `StreamingEvaluator`.

    Attributes:
        states: GB of disk for the states in the middle of the base model that trials begin with.
    """

    text: str
    carry: str | None = None
    chunk_size: int | None = None
    overlap: int | None = None
    window: int | None = None
    max_tokens: int | None = None
    states: float = 1.0

    def __post_init__(self) -> None:
        """What can be known before a model is loaded.

        Raises:
            EvaluationError: a setting or the text can't be.
        """
        if self.states < 0:
            raise EvaluationError(f"states = {self.states} is negative.\n  Set it to 0 or more GB.")
        options = self.options()
        StreamingSettings(parse_carry(options.pop("carry")), **options)
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
class ReadPlan:
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

    reading: TextRequest
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
    def from_json(cls, values: dict[str, Any]) -> "ReadPlan":
        """The inverse of `to_json`."""
        own = {"reading": TextRequest(**values["reading"]), "notes": tuple(values["notes"])}
        return cls(**{**values, **own})


@dataclass(frozen=True)
class ReadFiles:
    """What is kept on the disk of the machine that reads a whole text, where the folder is there.

    Attributes:
        folder: Of what is found.
        name: The model's.
        begins: Blocks at which edits begin whose models read the text later.
    """

    folder: Path
    name: str
    begins: tuple[int, ...] = ()

    @property
    def state(self) -> Path | None:
        """File for what a text that is stopped goes on from."""
        return self.folder / f"{self.name}.state" if self.folder.is_dir() else None

    def states(self, gigabytes: float) -> HiddenStateCache | None:
        """Folder for states in the middle of the model."""
        if not gigabytes or not self.folder.is_dir():
            return None
        return HiddenStateCache(self.folder / "states", int(gigabytes * 1e9))


class TextReader:
    """Reads texts with a model."""

    def __init__(self, model: LanguageModel) -> None:
        """Examine nothing yet."""
        self._model = model
        self._examined: StreamingEvaluator | None = None
        self._evaluators: dict[TextRequest, StreamingEvaluator] = {}

    def route(self, reading: TextRequest, count: bool) -> ReadPlan:
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
        return ReadPlan(chosen, text.fingerprint, length, chunks, stretch, choice.notes)

    def read(
        self, route: ReadPlan, first: int, count: int | None, keeping: ReadFiles | None = None
    ) -> Iterator[ChunkResult]:
        """Chunks of a text, one by one.

        Args:
            route: How it is read.
            first: Number of the first chunk that is wanted; earlier ones may come, too.
            count: How many; all there are if None.
            keeping: What is kept on the disk, if all are wanted.

        Raises:
            EvaluationError: a chunk can't be read.
        """
        text = self._open(route.reading)
        if count is not None:
            yield from self._evaluator(route.reading).stretch(text, first, count)
            return
        states = keeping.states(route.reading.states) if keeping else None
        begins = keeping.begins if keeping else ()
        evaluator = self._like(route.reading, states, begins)
        state = keeping.state if keeping else None
        yield from evaluator.stream(text, state=state, first_wanted=first)

    def _evaluator(self, reading: TextRequest) -> StreamingEvaluator:
        if reading not in self._evaluators:
            self._evaluators[reading] = self._like(reading)
        return self._evaluators[reading]

    def _like(
        self,
        reading: TextRequest,
        states: HiddenStateCache | None = None,
        begins: tuple[int, ...] = (),
    ) -> StreamingEvaluator:
        """A new one, of the model that was examined."""
        if self._examined is None:
            self._examined = StreamingEvaluator(self._model)
        options = reading.options()
        return self._examined.with_settings(**options, states=states, states_at=begins)

    def _open(self, reading: TextRequest) -> TokenSource:
        return open_source(reading.text, self._model.chat.tokenizer)


def _counted(text: TokenSource, limit: int | None) -> int:
    """Tokens of a text, read through as far as they count."""
    found = 0
    for block in text.blocks():
        found += len(block)
        if limit is not None and found >= limit:
            return limit
    return found
