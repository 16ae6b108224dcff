"""Tokens, block by block: arrays in memory or mapped from a file, iterators. Knows no models."""

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
"""Tokens from either end that tell one text from another."""


@runtime_checkable
class TokenSource(Protocol):
    """A text as tokens, in order.

    Attributes:
        name: What it is called in errors.
        length: Its tokens, if that is known before reading.
        fingerprint: Tells it from other texts; empty if nothing can.
    """

    name: str
    length: int | None
    fingerprint: str

    def blocks(self, start: int = 0) -> Iterator[Tensor]:
        """Token ids from token number `start` on, int64."""


class TokenArray:
    """Tokens that can be looked up by number: in memory, or mapped from a file."""

    def __init__(self, values: Any, name: str) -> None:
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
        """Token ids, copied block by block."""
        for first in range(start, len(self._values), BLOCK):
            block = numpy.array(self._values[first : first + BLOCK], dtype=numpy.int64)
            yield torch.from_numpy(block)


class TokenStream:
    """An iterator of tokens or blocks of them; it is read once."""

    def __init__(self, blocks: Iterator[Any], name: str = "iterator") -> None:
        self.name, self.fingerprint = name, ""
        self.length: int | None = None
        self._blocks = blocks
        self._begun = False

    def blocks(self, start: int = 0) -> Iterator[Tensor]:
        """What the iterator yields, from token `start` on.

        Raises:
            TokenSourceError: it was read before.
        """
        if self._begun:
            raise TokenSourceError(
                f"{self.name} has been read and can't begin again.\n"
                "  Give a new iterator for each evaluation, or write its tokens to a .npy file."
            )
        self._begun = True
        return skip_tokens(map(self._block, self._blocks), start)

    def _block(self, block: Any) -> Tensor:
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
    """Blocks without their first `start` tokens."""
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
            limit: Tokens of the text that count.
            vocab: Ids of the model.
        """
        self._source, self._limit, self._vocab = source, limit, vocab
        self._held, self._first = torch.empty(0, dtype=torch.int64), start
        self._blocks = chain(source.blocks(start))

    def read(self, first: int, stop: int) -> Tensor:
        """Tokens `first` to `stop`, fewer at the end of the text; `first` never goes back."""
        stop = stop if self._limit is None else min(stop, self._limit)
        self._held = self._held[first - self._first :]
        self._first = first
        while first + len(self._held) < stop:
            block = next(self._blocks, None)
            if block is None:
                break
            self._held = torch.cat([self._held, block])
        read = self._held[: max(0, stop - first)]
        self._refuse_unknown(read, first)
        return read

    def _refuse_unknown(self, read: Tensor, at: int) -> None:
        wrong = ((read < 0) | (read >= self._vocab)).nonzero()
        if len(wrong):
            place = int(wrong[0])
            raise TokenSourceError(
                f"{self._source.name}: token {at + place} is {int(read[place])}, and the model "
                f"has ids from 0 to {self._vocab - 1}.\n"
                "  Was it made with another model's tokenizer, or written with another dtype?"
            )
