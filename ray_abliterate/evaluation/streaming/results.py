"""The results of an evaluation, chunk by chunk and in total. Plain values that JSON can hold."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

MOST_NATS = 700.0
"""The exponential of more nats than this overflows a float."""


def perplexity(loss: float) -> float:
    """Return exp(`loss`), where `loss` is in nats per token."""
    return math.exp(min(loss, MOST_NATS))


@dataclass(frozen=True)
class ChunkResult:
    """The result of one chunk.

    Attributes:
        index: Number of the chunk.
        start: Position in the text of the first token that belongs to the chunk.
        stop: One after the position of its last token.
        tokens: Tokens that were predicted; the first token of a text is not.
        nats: Sum of their losses.
        seconds: Time the chunk took.
        passes: Forward passes the chunk took.
        carried_bytes: Memory of what the chunk handed on.
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
        """Return the mean loss in nats per predicted token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """Return the exponential of the chunk's mean loss."""
        return perplexity(self.loss)

    @property
    def tokens_per_second(self) -> float:
        """Return the number of predicted tokens per second."""
        return self.tokens / max(self.seconds, 1e-9)

    def to_json(self) -> dict[str, Any]:
        """Return the fields, and what is derived from them."""
        derived = ("loss", "perplexity", "tokens_per_second")
        return {**asdict(self), **{name: getattr(self, name) for name in derived}}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "ChunkResult":
        """Read back what `to_json` gave; derived values are ignored."""
        return cls(**{name: values[name] for name in cls.__dataclass_fields__})


@dataclass(frozen=True)
class Totals:
    """Sums and statistics over chunks.

    Attributes:
        chunks: Number of chunks.
        tokens: Tokens that were predicted.
        nats: Sum of their losses.
        seconds: Time that the chunks took.
        carried_bytes: The most that any chunk handed on.
        mean: Mean of the chunks' losses, each chunk counting once.
        squares: Sum of squared distances from that mean.
        carry: What chunks handed on.
        notes: What was chosen on the user's behalf, and why.
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
        """Add up chunks by number, so that the sums do not depend on who computed them when."""
        totals = cls(carry=str(carry), notes=tuple(notes))
        for result in sorted(results, key=lambda result: result.index):
            totals = totals.plus(result)
        return totals

    def plus(self, result: ChunkResult) -> "Totals":
        """Return the totals with one chunk more (Welford's update)."""
        chunks = self.chunks + 1
        deviation = result.loss - self.mean
        mean = self.mean + deviation / chunks
        return Totals(
            chunks,
            self.tokens + result.tokens,
            self.nats + result.nats,
            self.seconds + result.seconds,
            max(self.carried_bytes, result.carried_bytes),
            mean,
            self.squares + deviation * (result.loss - mean),
            self.carry,
            self.notes,
        )

    @property
    def loss(self) -> float:
        """Return the mean loss in nats per token; each token counts once."""
        return self.nats / max(self.tokens, 1)

    @property
    def perplexity(self) -> float:
        """Return the exponential of the mean loss over all tokens."""
        return perplexity(self.loss)

    @property
    def deviation(self) -> float:
        """Return the standard deviation of the chunks' losses; 0 for one chunk."""
        return math.sqrt(self.squares / (self.chunks - 1)) if self.chunks > 1 else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Return the number of predicted tokens per second."""
        return self.tokens / max(self.seconds, 1e-9)

    def to_json(self) -> dict[str, Any]:
        """Return the fields, and what is derived from them."""
        derived = ("loss", "perplexity", "deviation", "tokens_per_second")
        values = asdict(self) | {"notes": list(self.notes)}
        return {**values, **{name: getattr(self, name) for name in derived}}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Totals":
        """Read back what `to_json` gave; derived values are ignored."""
        fields = {name: values[name] for name in cls.__dataclass_fields__}
        return cls(**{**fields, "notes": tuple(fields["notes"])})


@dataclass(frozen=True)
class ReadingProgress:
    """How far the reading of a text has come.

    Attributes:
        chunk: The chunk that has just ended.
        totals: Totals of all chunks so far.
        position: Tokens of the text that have been read.
        length: Tokens of the text, if known.
        seconds_left: Time for the rest at the pace so far, if the length is known.
    """

    chunk: ChunkResult
    totals: Totals
    position: int
    length: int | None
    seconds_left: float | None
