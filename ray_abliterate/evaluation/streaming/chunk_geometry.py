"""Where the chunks of a text lie, in tokens. Values; knows nothing about models."""

from dataclasses import dataclass

from ray_abliterate.errors import EvaluationError
from ray_abliterate.evaluation.streaming.carried_context import CarriedContext


@dataclass(frozen=True)
class TokenSpan:
    """Where one chunk lies in the text, in tokens.

    Attributes:
        index: Number of the chunk.
        first: The first token that is fed to the model.
        start: The first token that belongs to the chunk; those before it are context.
        stop: One after the chunk's last token.
    """

    index: int
    first: int
    start: int
    stop: int


@dataclass(frozen=True)
class ChunkGeometry:
    """Cuts a text into chunks: each token but the first one is predicted in exactly one of them.

    Attributes:
        carry: What a chunk knows of the text before it.
        chunk_size: Tokens of a chunk, the overlap included.
        overlap: Tokens of a chunk that are context only; they belong to the chunk before.

    Raises:
        EvaluationError: the sizes are impossible, or contradict what is carried.
    """

    carry: CarriedContext
    chunk_size: int
    overlap: int = 0

    def __post_init__(self) -> None:
        if self.chunk_size < 2:
            raise EvaluationError(
                f"chunk_size = {self.chunk_size}: a chunk needs two tokens, one to predict the "
                "other.\n  Set chunk_size to 2 or more."
            )
        if self.overlap < 0:
            raise EvaluationError(
                f"overlap = {self.overlap} is negative.\n  Set it to 0 or more tokens."
            )
        if self.overlap and self.carry is not CarriedContext.NONE:
            raise EvaluationError(
                f"overlap = {self.overlap} with carry = {self.carry.value}: what is carried is "
                "already the context.\n  Set overlap = 0, or carry = none."
            )
        if self.overlap >= self.chunk_size:
            raise EvaluationError(
                f"overlap = {self.overlap} leaves nothing of chunk_size = {self.chunk_size}.\n"
                f"  Set overlap below {self.chunk_size}, or chunk_size above {self.overlap}."
            )

    @property
    def stride(self) -> int:
        """Return the number of new tokens in each chunk but the first."""
        return self.chunk_size - self.overlap

    def span(self, index: int) -> TokenSpan:
        """Return where chunk number `index` lies, if the text reaches that far."""
        begin = index * self.stride
        stop, start = begin + self.chunk_size, begin + (self.overlap if index else 0)
        if self.carry is CarriedContext.NONE:
            return TokenSpan(index, begin, start, stop)
        # the token before the chunk has been held back: its output predicts the chunk's first one
        return TokenSpan(index, max(start - 1, 0), start, stop)

    def chunks(self, tokens: int) -> int:
        """Return how many chunks a text of `tokens` tokens makes."""
        if tokens < 2:
            return 0
        beyond_first = max(0, tokens - self.chunk_size)
        count = 1 + -(-beyond_first // self.stride)
        # an independent chunk of one token has nothing to predict
        isolated = count > 1 and self.carry is CarriedContext.NONE and not self.overlap
        return count - (isolated and beyond_first % self.stride == 1)
