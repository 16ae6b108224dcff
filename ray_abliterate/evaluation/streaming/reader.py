"""Reads one long text with one model, anywhere: how it is read, and stretches of its chunks.

All replicas read a text in the same way, which one of them chooses; so a stretch has the same
results whichever replica reads it.
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
WARM_UP_SHARE = 8
"""A stretch is so many times as long as what is fed before it."""


@dataclass(frozen=True)
class TextRequest:
    """A text, and how the user wants it read; fields are those of `StreamingEvaluator`.

    Attributes:
        text: A file, or `hub:owner/name` for a data set of the Hub.
        states: GB of disk for the base model's hidden states, from which trials begin.

    Raises:
        EvaluationError: the text or a setting is wrong, as far as that can be known before a model
            is loaded.
    """

    text: str
    carry: str | None = None
    chunk_size: int | None = None
    overlap: int | None = None
    window: int | None = None
    max_tokens: int | None = None
    states: float = 1.0

    def __post_init__(self) -> None:
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
        """Return the settings, as `StreamingEvaluator` takes them."""
        return {
            "carry": self.carry,
            "chunk_size": self.chunk_size,
            "overlap": self.overlap,
            "window": self.window,
            "max_tokens": self.max_tokens,
        }


@dataclass(frozen=True)
class ReadPlan:
    """How a text is read, as one replica has chosen for all.

    Attributes:
        reading: The request, with every setting filled in.
        fingerprint: The text's.
        tokens: Tokens of the text that count; None if nobody has counted them.
        chunks: Number of its chunks; None likewise.
        stretch: Chunks that any replica reads in one go; None if one replica reads all of them. It
            follows from model and text alone, so results don't depend on the number of replicas.
        notes: What was chosen on the user's behalf, and why.
    """

    reading: TextRequest
    fingerprint: str
    tokens: int | None
    chunks: int | None
    stretch: int | None
    notes: tuple[str, ...]

    def pieces(self) -> tuple[tuple[int, int | None], ...]:
        """Return the first chunk and the number of chunks of each stretch; None for all chunks."""
        if self.stretch is None or self.chunks is None:
            return ((0, None),)
        starts = range(0, self.chunks, self.stretch)
        return tuple((first, min(self.stretch, self.chunks - first)) for first in starts)

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain JSON values."""
        return {**asdict(self), "notes": list(self.notes)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "ReadPlan":
        """Read back what `to_json` gave."""
        parsed = {"reading": TextRequest(**values["reading"]), "notes": tuple(values["notes"])}
        return cls(**{**values, **parsed})


@dataclass(frozen=True)
class ReadFiles:
    """Files that the reader of a whole text keeps on its own machine, if it has the folder.

    Attributes:
        folder: Where the results of the evaluation are.
        model: Name of the model that reads.
        cached_blocks: Blocks at which the edits of models begin that will read the text later.
    """

    folder: Path
    model: str
    cached_blocks: tuple[int, ...] = ()

    def state_file(self) -> Path | None:
        """Return the file from which a reading that was interrupted resumes."""
        return self.folder / f"{self.model}.state" if self.folder.is_dir() else None

    def state_cache(self, gigabytes: float) -> HiddenStateCache | None:
        """Return a cache of hidden states with a size limit; None for a limit of 0."""
        if not gigabytes or not self.folder.is_dir():
            return None
        return HiddenStateCache(self.folder / "states", int(gigabytes * 1e9))


class TextReader:
    """Reads texts with one model, whose capabilities are checked when the first text comes."""

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self._checked: StreamingEvaluator | None = None
        self._evaluators: dict[TextRequest, StreamingEvaluator] = {}

    def plan_reading(self, request: TextRequest, count: bool) -> ReadPlan:
        """Decide how a text is read.

        Args:
            request: What the user asks for.
            count: Read the text through, if need be, to know how long it is.

        Raises:
            EvaluationError: the text can't be read in this way.
        """
        evaluator, text = self._evaluator(request), self._open(request)
        length, chosen = evaluator.length(text), request
        if length is None and count:
            length = _count_tokens(self._open(request), request.max_tokens)
        choice, chunks, stretch = evaluator.choose(length), None, None
        if length is not None:
            refuse_short(text.name, length, request.chunk_size)
            geometry = choice.geometry
            single = length <= geometry.chunk_size
            size, overlap = (length, 0) if single else (geometry.chunk_size, geometry.overlap)
            chosen = replace(request, chunk_size=size, overlap=overlap)
            chunks = geometry.chunks(length)
            warm_up = evaluator.warm_up(choice)
            if warm_up is not None:
                stretch = max(STRETCH, -(-WARM_UP_SHARE * warm_up // geometry.stride))
        chosen = replace(chosen, carry=choice.carry.value, window=choice.window)
        return ReadPlan(chosen, text.fingerprint, length, chunks, stretch, choice.notes)

    def read(
        self, plan: ReadPlan, first: int, count: int | None, files: ReadFiles | None = None
    ) -> Iterator[ChunkResult]:
        """Yield the results of a stretch of chunks, one by one.

        Args:
            plan: How the text is read.
            first: Number of the first chunk that is wanted; earlier ones may come, too.
            count: Number of chunks; all there are if None.
            files: Files that the reading of all chunks keeps.

        Raises:
            EvaluationError: a chunk can't be read.
        """
        text = self._open(plan.reading)
        if count is not None:
            yield from self._evaluator(plan.reading).stretch(text, first, count)
            return
        cache = files.state_cache(plan.reading.states) if files else None
        cached_blocks = files.cached_blocks if files else ()
        evaluator = self._new_evaluator(plan.reading, cache, cached_blocks)
        state = files.state_file() if files else None
        yield from evaluator.stream(text, state=state, first_wanted=first)

    def _evaluator(self, request: TextRequest) -> StreamingEvaluator:
        if request not in self._evaluators:
            self._evaluators[request] = self._new_evaluator(request)
        return self._evaluators[request]

    def _new_evaluator(
        self,
        request: TextRequest,
        cache: HiddenStateCache | None = None,
        cached_blocks: tuple[int, ...] = (),
    ) -> StreamingEvaluator:
        """Return an evaluator with the request's settings; the model is checked only once."""
        if self._checked is None:
            self._checked = StreamingEvaluator(self._model)
        options = request.options()
        return self._checked.with_settings(**options, states=cache, states_at=cached_blocks)

    def _open(self, request: TextRequest) -> TokenSource:
        return open_source(request.text, self._model.chat.tokenizer)


def _count_tokens(text: TokenSource, limit: int | None) -> int:
    """Return the number of tokens of a text, which is read through as far as they count."""
    count = 0
    for block in text.blocks():
        count += len(block)
        if limit is not None and count >= limit:
            return limit
    return count
