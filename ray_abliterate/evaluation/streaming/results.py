"""What an evaluation finds, chunk by chunk and in sum. Plain values that JSON can hold."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

MOST_NATS = 700.0
"""The exponential of more is no float."""


def perplexity(loss: float) -> float:
    """exp(mean nats per token)."""
    return math.exp(min(loss, MOST_NATS))


@dataclass(frozen=True)
class ChunkResult:
    """One chunk.

    Attributes:
        index: Its number.
        start: Its first own token in the text.
        stop: One after its last.
        tokens: Tokens that were predicted; the first token of a text is not.
        nats: Sum of their losses.
        seconds: Time it took.
        passes: Forward passes it took.
        carried_bytes: Memory of what it handed on.
    """

    index: int
    start: int
    stop: int
    tokens: int
    nats: float
    seconds: float
    passes: int
    carried_bytes: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return perplexity(self.loss)

    @property
    def tokens_per_second(self) -> float:
        """Predicted tokens."""
        return self.tokens / max(self.seconds, 1e-9)

    def to_json(self) -> dict[str, Any]:
        """The fields, and what is derived from them."""
        derived = ("loss", "perplexity", "tokens_per_second")
        return {**asdict(self), **{name: getattr(self, name) for name in derived}}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "ChunkResult":
        """The other way."""
        return cls(**{name: values[name] for name in cls.__dataclass_fields__})


@dataclass(frozen=True)
class Totals:
    """Sums over chunks.

    Attributes:
        chunks: How many.
        tokens: Tokens that were predicted.
        nats: Sum of their losses.
        seconds: Time that the chunks took.
        carried_bytes: The most that a chunk handed on.
        mean: Mean of the chunks' losses, each chunk counting once.
        squares: Sum of squared distances from that mean.
        carry: What chunks handed on.
        notes: What was chosen, and why.
    """

    chunks: int = 0
    tokens: int = 0
    nats: float = 0.0
    seconds: float = 0.0
    carried_bytes: int = 0
    mean: float = 0.0
    squares: float = 0.0
    carry: str = ""
    notes: tuple[str, ...] = field(default=())

    @classmethod
    def of(
        cls, results: Iterable[ChunkResult], carry: str = "", notes: Iterable[str] = ()
    ) -> "Totals":
        """Chunks from wherever, added by number: who computed them when does not show."""
        found = cls(carry=str(carry), notes=tuple(notes))
        for result in sorted(results, key=lambda result: result.index):
            found = found.plus(result)
        return found

    def plus(self, result: ChunkResult) -> "Totals":
        """With one chunk more (Welford's update)."""
        chunks = self.chunks + 1
        away = result.loss - self.mean
        mean = self.mean + away / chunks
        return Totals(
            chunks,
            self.tokens + result.tokens,
            self.nats + result.nats,
            self.seconds + result.seconds,
            max(self.carried_bytes, result.carried_bytes),
            mean,
            self.squares + away * (result.loss - mean),
            self.carry,
            self.notes,
        )

    @property
    def loss(self) -> float:
        """Nats per token; each token counts once."""
        return self.nats / max(self.tokens, 1)

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return perplexity(self.loss)

    @property
    def deviation(self) -> float:
        """Standard deviation of the chunks' losses; 0 for one chunk."""
        return math.sqrt(self.squares / (self.chunks - 1)) if self.chunks > 1 else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Predicted tokens."""
        return self.tokens / max(self.seconds, 1e-9)

    def to_json(self) -> dict[str, Any]:
        """The fields, and what is derived from them."""
        derived = ("loss", "perplexity", "deviation", "tokens_per_second")
        values = asdict(self) | {"notes": list(self.notes)}
        return {**values, **{name: getattr(self, name) for name in derived}}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Totals":
        """The other way."""
        own = {name: values[name] for name in cls.__dataclass_fields__}
        return cls(**{**own, "notes": tuple(own["notes"])})


@dataclass(frozen=True)
class ReadingProgress:
    """How far an evaluation is.

    Attributes:
        chunk: The chunk that has just ended.
        totals: All until now.
        position: Tokens of the text that are behind.
        length: Tokens of the text, if that is known.
        seconds_left: What the rest takes at the pace until now, if its length is known.
    """

    chunk: ChunkResult
    totals: Totals
    position: int
    length: int | None
    seconds_left: float | None
