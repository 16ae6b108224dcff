"""Token sources: arrays in memory or mapped from a file, and iterators, read block by block.

Knows nothing about models.
"""

import hashlib
from collections.abc import Iterator
from itertools import chain
from typing import Any, Protocol, runtime_checkable

import numpy
import torch
from torch import Tensor

from ray_abliterate.errors import TokenSourceError

BLOCK = 1 << 16
"""Tokens that are read at once."""
SAMPLE = 4096
"""Tokens, or bytes, at either end of a text that go into its fingerprint."""


@runtime_checkable
class TokenSource(Protocol):
    """A text as tokens, in order.

    Attributes:
        name: What errors call it.
        length: Its number of tokens, if known before reading.
        fingerprint: Differs from that of other texts; empty if the text cannot be identified.
    """

    name: str
    length: int | None
    fingerprint: str

    def blocks(self, start: int = 0) -> Iterator[Tensor]:
        """Yield token ids from token number `start` on, `"token"`, int64."""


class TokenArray:
    """Tokens with random access: in memory, or mapped from a file."""

    def __init__(self, values: Any, name: str) -> None:
        """Look at both ends of the array, which identify the text.

        Raises:
            TokenSourceError: `values` is not a one-dimensional array of integers.
        """
        if values.ndim != 1 or values.dtype.kind not in "iu":
            raise TokenSourceError(
                f"{name} holds {values.dtype} of shape {tuple(values.shape)}; tokens are a "
                "one-dimensional array of integers."
            )
        self.name, self._values = name, values
        self.length: int | None = int(values.shape[0])
        ends = numpy.concatenate([values[:SAMPLE], values[-SAMPLE:]]).astype("<i8")
        digest = hashlib.sha256(ends.tobytes()).hexdigest()
        self.fingerprint = f"{self.length}:{digest[:16]}"

    def blocks(self, start: int = 0) -> Iterator[Tensor]:
        """Yield copies of the token ids, block by block."""
        for first in range(start, len(self._values), BLOCK):
            block = numpy.array(self._values[first : first + BLOCK], dtype=numpy.int64)
            yield torch.from_numpy(block)


class TokenStream:
    """An iterator of tokens, or of blocks of them, which can be read only once."""

    def __init__(self, blocks: Iterator[Any], name: str = "iterator") -> None:
        self.name, self.fingerprint = name, ""
        self.length: int | None = None
        self._blocks = blocks
        self._begun = False

    def blocks(self, start: int = 0) -> Iterator[Tensor]:
        """Yield what the iterator yields, from token `start` on.

        Raises:
            TokenSourceError: it has been read before, or yields something other than token ids.
        """
        if self._begun:
            raise TokenSourceError(
                f"{self.name} has been read and can't begin again.\n"
                "  Give a new iterator for each evaluation, or write its tokens to a .npy file."
            )
        self._begun = True
        return skip_tokens(map(self._token_ids, self._blocks), start)

    def _token_ids(self, block: Any) -> Tensor:
        try:
            ids = torch.as_tensor(block)
        except (TypeError, ValueError, RuntimeError):
            ids = torch.empty(0)
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise TokenSourceError(
                f"{self.name} yields {type(block).__name__}, not token ids.\n"
                "  Yield integers, or one-dimensional arrays of them."
            )
        return ids.reshape(-1).to("cpu", torch.int64)


def skip_tokens(blocks: Iterator[Tensor], start: int) -> Iterator[Tensor]:
    """Yield blocks without their first `start` tokens."""
    for block in blocks:
        if start < len(block):
            yield block[start:]
        start = max(0, start - len(block))


class TokenCursor:
    """Reads a source forward, a little at a time, and refuses ids that the model does not have."""

    def __init__(self, source: TokenSource, start: int, limit: int | None, vocab: int) -> None:
        """
        Args:
            source: The text.
            start: The first token that will be asked for.
            limit: Tokens of the text that count; all if None.
            vocab: Number of token ids of the model.
        """
        self._source, self._limit, self._vocab = source, limit, vocab
        self._buffer, self._buffer_start = torch.empty(0, dtype=torch.int64), start
        self._blocks = chain(source.blocks(start))

    def read(self, first: int, stop: int) -> Tensor:
        """Return tokens `first` to `stop`, fewer at the end of the text.

        `first` must not decrease from call to call: tokens before it are dropped.

        Raises:
            TokenSourceError: a token is not an id of the model.
        """
        stop = stop if self._limit is None else min(stop, self._limit)
        self._buffer = self._buffer[first - self._buffer_start :]
        self._buffer_start = first
        while first + len(self._buffer) < stop:
            block = next(self._blocks, None)
            if block is None:
                break
            self._buffer = torch.cat([self._buffer, block])
        tokens = self._buffer[: max(0, stop - first)]
        self._refuse_unknown_ids(tokens, first)
        return tokens

    def _refuse_unknown_ids(self, tokens: Tensor, first: int) -> None:
        wrong = ((tokens < 0) | (tokens >= self._vocab)).nonzero()
        if len(wrong):
            offset = int(wrong[0])
            raise TokenSourceError(
                f"{self._source.name}: token {first + offset} is {int(tokens[offset])}, and the "
                f"model has ids from 0 to {self._vocab - 1}.\n"
                "  Was it made with another model's tokenizer, or written with another dtype?"
            )
