"""Reads one text chunk after chunk: totals, saved states, token losses, and progress."""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_abliterate.errors import EvaluationError, TokenSourceError
from ray_abliterate.evaluation.streaming.carried_context import CarriedContext
from ray_abliterate.evaluation.streaming.carry_choice import CarryChoice, StreamingSettings
from ray_abliterate.evaluation.streaming.chunk_reader import ChunkReader
from ray_abliterate.evaluation.streaming.hidden_state_cache import StatesMissing, TextStates
from ray_abliterate.evaluation.streaming.results import ChunkResult, ReadingProgress, Totals
from ray_abliterate.evaluation.streaming.saved_state import SavedState
from ray_abliterate.evaluation.streaming.token_losses import TokenLosses
from ray_abliterate.evaluation.streaming.token_sources import TokenCursor, TokenSource

log = logging.getLogger(__name__)

SAVE_SECONDS = 30.0
MOST_SAVED_BYTES = 1 << 28
"""A larger cache is not saved: the text is read again to rebuild it."""


@dataclass(frozen=True)
class StreamedText:
    """A text, and how it is read.

    Attributes:
        source: The text.
        choice: How it is read.
        settings: What the user asked for.
    """

    source: TokenSource
    choice: CarryChoice
    settings: StreamingSettings

    @property
    def length(self) -> int | None:
        """Return the number of tokens that count, if known before reading."""
        length, limit = self.source.length, self.settings.max_tokens
        return length if length is None or limit is None else min(length, limit)

    def cursor(self, start: int, vocab: int) -> TokenCursor:
        """Return a cursor over the tokens from `start` on, for a model with `vocab` ids."""
        return TokenCursor(self.source, start, self.settings.max_tokens, vocab)

    def identity(self, model: str) -> dict[str, Any]:
        """Return what a saved state has to agree on: model fingerprint, text and settings."""
        return {
            "model": model,
            "source": self.source.fingerprint,
            "carry": self.choice.carry.value,
            "chunk_size": self.choice.geometry.chunk_size,
            "overlap": self.choice.geometry.overlap,
            "window": self.choice.window,
            "max_tokens": self.settings.max_tokens,
        }


@dataclass(frozen=True)
class StreamOptions:
    """What happens while a text is read.

    Attributes:
        state: File in which the evaluation is saved, and from which it resumes if it exists.
        token_losses: Arrow file for the losses of single tokens.
        on_progress: Called after each chunk.
        save_seconds: Time between two saves.
        first_wanted: Number of a chunk that a saved state must not be beyond; any if None.
    """

    state: Path | None = None
    token_losses: Path | None = None
    on_progress: Callable[[ReadingProgress], None] | None = None
    save_seconds: float = SAVE_SECONDS
    first_wanted: int | None = None


class Stream:
    """The evaluation of one text: iterate over it to get the chunks' results.

    Attributes:
        choice: How the text is read.
        text: The text.
        totals: Totals of all chunks so far.
    """

    def __init__(
        self,
        streamed: StreamedText,
        reader: ChunkReader,
        model: str,
        options: StreamOptions,
        open_states: Callable[[], TextStates | None],
    ) -> None:
        """
        Args:
            streamed: The text, and how it is read.
            reader: Feeds chunks to the model.
            model: The model's fingerprint.
            options: What happens while the text is read.
            open_states: Opens the cached hidden states of the text, when its reading begins.
        """
        self.choice, self.text = streamed.choice, streamed.source
        self.totals = Totals(carry=self.choice.carry.value, notes=self.choice.notes)
        self._streamed, self._reader = streamed, reader
        self._options, self._open_states = options, open_states
        self._identity = streamed.identity(model)
        self._chunks = self._run()
        for note in self.choice.notes:
            log.info("%s: %s", self.text.name, note)

    def __iter__(self) -> Iterator[ChunkResult]:
        return self._chunks

    def close(self) -> None:
        """Stop reading; what was saved stays."""
        self._chunks.close()  # type: ignore[attr-defined]

    def _run(self) -> Iterator[ChunkResult]:
        state, losses_file = self._options.state, self._options.token_losses
        saved = None if state is None else SavedState.read(state, self._identity)
        wanted = self._options.first_wanted
        if saved is not None and wanted is not None and saved.next_chunk > wanted:
            saved = None
        number = saved.next_chunk if saved else 0
        self.totals = saved.totals if saved else self.totals
        cursor = self._resume(saved, number)
        from_start = number == 0 or self.choice.carry is CarriedContext.NONE
        text_states = self._open_states() if from_start else None
        self._reader.text_states = text_states
        size = saved.losses_bytes if saved else 0
        losses = TokenLosses(losses_file, size) if losses_file else None
        complete = False
        try:
            yield from self._read_chunks(cursor, number, losses)
            complete = True
            if text_states is not None:
                text_states.mark_complete()
        finally:
            self._reader.drop_states()
            if losses is not None:
                losses.close(complete)
        if state is not None:
            state.unlink(missing_ok=True)

    def _read_chunks(
        self, cursor: TokenCursor, number: int, losses: TokenLosses | None
    ) -> Iterator[ChunkResult]:
        """Yield chunks from `number` on; write, save and report each as it ends."""
        tokens_before = self.totals.tokens
        began, last_save = time.perf_counter(), time.perf_counter()
        state = self._options.state
        while True:
            span = self.choice.geometry.span(number)
            ids = cursor.read(span.first, span.stop)
            if number == 0:
                refuse_short(self.text.name, len(ids), self._streamed.settings.chunk_size)
            if len(ids) < 2 or span.first + len(ids) <= span.start:
                return
            try:
                result, chunk_losses = self._reader.read(span, ids, self.choice)
            except StatesMissing:
                log.info(
                    "%s: cached hidden states end at chunk %d; the text is read again up to there",
                    self.text.name,
                    number,
                )
                cursor = self._replay(number)
                continue
            self.totals = self.totals.plus(result)
            number += 1
            if losses is not None:
                losses.append(result.stop - result.tokens, ids[-result.tokens :], chunk_losses)
            if state is not None and time.perf_counter() - last_save >= self._options.save_seconds:
                self._save(state, number, losses)
                last_save = time.perf_counter()
            seconds = time.perf_counter() - began
            self._report(result, self.totals.tokens - tokens_before, seconds)
            yield result

    def _resume(self, saved: SavedState | None, number: int) -> TokenCursor:
        """Return a cursor at chunk `number`, with the model in the state it was in before it."""
        self._reader.begin(self.choice)
        independent = self.choice.carry is CarriedContext.NONE
        if saved is None or independent or self._loads(saved):
            return self._cursor(self.choice.geometry.span(number).first)
        return self._replay(number)

    def _replay(self, number: int) -> TokenCursor:
        """Do the same by feeding the text from its beginning, without its hidden states."""
        self._reader.drop_states()
        self._reader.begin(self.choice)
        cursor = self._cursor(0)
        for index in range(number):
            span = self.choice.geometry.span(index)
            self._reader.replay(cursor.read(span.first, span.stop)[:-1], self.choice)
        return cursor

    def _loads(self, saved: SavedState) -> bool:
        """Return whether the model continues from the saved state, or has to read it all again."""
        return saved.rest is not None and self._reader.runner.load(saved.tensors, saved.rest)

    def _cursor(self, start: int) -> TokenCursor:
        return self._streamed.cursor(start, self._reader.runner.vocab)

    def _save(self, state: Path, number: int, losses: TokenLosses | None) -> None:
        size = 0 if losses is None else losses.flush()
        tensors, rest = self._export() or ({}, None)
        SavedState(self._identity, self.totals, number, size, tensors, rest).write(state)

    def _export(self) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
        """Return what the model remembers of the text, if that is needed and small enough."""
        runner = self._reader.runner
        if self.choice.carry is CarriedContext.NONE or runner.carried_bytes > MOST_SAVED_BYTES:
            return None
        return runner.export()

    def _report(self, result: ChunkResult, tokens: int, seconds: float) -> None:
        """Report progress: `tokens` were predicted in `seconds` since the reading began."""
        if self._options.on_progress is None:
            return
        length = self._streamed.length
        seconds_left = None if length is None else (length - result.stop) * seconds / max(tokens, 1)
        progress = ReadingProgress(result, self.totals, result.stop, length, seconds_left)
        self._options.on_progress(progress)


def refuse_short(name: str, tokens: int, chunk_size: int | None) -> None:
    """Refuse a text that has no chunk, or less than one chunk of the size that was asked for.

    Args:
        name: What errors call the text.
        tokens: Tokens of the text, or of its first chunk.
        chunk_size: Tokens of a chunk, if the user sets them.

    Raises:
        TokenSourceError: the text has fewer than two tokens.
        EvaluationError: the text is shorter than a chunk.
    """
    if tokens == 0:
        raise TokenSourceError(f"source = {name} is empty.\n  Give a text of two tokens or more.")
    if tokens == 1:
        raise TokenSourceError(
            f"source = {name} has one token, and the first token of a text is not predicted.\n"
            "  Give a text of two tokens or more."
        )
    if chunk_size is not None and tokens < chunk_size:
        raise EvaluationError(
            f"source = {name} has {tokens} tokens, fewer than chunk_size = {chunk_size}.\n"
            f"  Set chunk_size = {tokens} or less, or leave it unset."
        )
