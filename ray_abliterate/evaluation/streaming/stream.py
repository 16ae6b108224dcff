"""One text, chunk after chunk: totals, saved states, losses of tokens, progress."""

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
from ray_abliterate.evaluation.streaming.runners import Runner
from ray_abliterate.evaluation.streaming.saved_state import SavedState
from ray_abliterate.evaluation.streaming.token_losses import TokenLosses
from ray_abliterate.evaluation.streaming.token_sources import TokenCursor, TokenSource

log = logging.getLogger(__name__)

SAVE_SECONDS = 30.0
MOST_SAVED_BYTES = 1 << 28
"""A larger cache is not saved: the text is read again to make it."""


@dataclass(frozen=True)
class StreamFiles:
    """What is written beside the results.

    Attributes:
        state: Where the evaluation is saved, and goes on from if it is there.
        token_losses: Arrow file of the losses of single tokens.
        save_seconds: Time between two savings.
        first_wanted: Chunk that a saved state must not be beyond; any state will do if None.
    """

    state: Path | None = None
    token_losses: Path | None = None
    save_seconds: float = SAVE_SECONDS
    first_wanted: int | None = None


class Stream:
    """One text's evaluation: iterate over its chunks.

    Attributes:
        choice: How it is evaluated.
        text: What is evaluated.
        totals: Of all chunks until now.
    """

    def __init__(
        self,
        text: TokenSource,
        choice: CarryChoice,
        settings: StreamingSettings,
        runner: Runner,
        reader: ChunkReader,
        model: str,
        files: StreamFiles,
        on_progress: Callable[[ReadingProgress], None] | None,
        states: Callable[[], TextStates | None],
    ) -> None:
        """
        Args:
            text: What is evaluated.
            choice: How.
            settings: What was asked for.
            runner: The model.
            reader: Feeds chunks to it.
            model: Its fingerprint.
            files: What is written beside.
            on_progress: Is told after each chunk.
            states: Makes the states that are kept of it, when reading begins.
        """
        self.choice, self.text = choice, text
        self.totals = Totals(carry=choice.carry.value, notes=choice.notes)
        self._settings, self._runner, self._reader = settings, runner, reader
        self._files, self._told, self._states = files, on_progress, states
        self._identity = {
            "model": model,
            "source": text.fingerprint,
            "carry": choice.carry.value,
            "chunk_size": choice.geometry.chunk_size,
            "overlap": choice.geometry.overlap,
            "window": choice.window,
            "max_tokens": settings.max_tokens,
        }
        self._chunks = self._run()
        for note in choice.notes:
            log.info("%s: %s", text.name, note)

    def __iter__(self) -> Iterator[ChunkResult]:
        return self._chunks

    def close(self) -> None:
        """Stop; what was saved stays."""
        self._chunks.close()  # type: ignore[attr-defined]

    def _run(self) -> Iterator[ChunkResult]:
        state, losses_at = self._files.state, self._files.token_losses
        saved = None if state is None else SavedState.read(state, self._identity)
        wanted = self._files.first_wanted
        if saved is not None and wanted is not None and saved.next_chunk > wanted:
            saved = None
        number = saved.next_chunk if saved else 0
        self.totals = saved.totals if saved else self.totals
        tape = self._begin(saved, number)
        known = self._states() if number == 0 or self.choice.carry is CarriedContext.NONE else None
        self._reader.kept = known
        size = saved.losses_bytes if saved else 0
        losses = TokenLosses(losses_at, size) if losses_at else None
        whole = False
        try:
            yield from self._chunk_by_chunk(tape, number, losses)
            whole = True
            if known is not None:
                known.end()
        finally:
            self._reader.forget()
            if losses is not None:
                losses.close(whole)
        if state is not None:
            state.unlink(missing_ok=True)

    def _chunk_by_chunk(
        self, tape: TokenCursor, number: int, losses: TokenLosses | None
    ) -> Iterator[ChunkResult]:
        at_start, began, saved = self.totals.tokens, time.perf_counter(), time.perf_counter()
        state = self._files.state
        while True:
            span = self.choice.geometry.span(number)
            ids = tape.read(span.first, span.stop)
            if number == 0:
                refuse_short(self.text.name, len(ids), self._settings.chunk_size)
            if len(ids) < 2 or span.first + len(ids) <= span.start:
                return
            try:
                result, found = self._reader.measure(span, ids, self.choice)
            except StatesMissing:
                log.info(
                    "%s: kept states end at chunk %d; it is read again", self.text.name, number
                )
                tape = self._read_again(number)
                continue
            self.totals = self.totals.plus(result)
            number += 1
            if losses is not None:
                losses.append(result.stop - result.tokens, ids[-result.tokens :], found)
            if state is not None and time.perf_counter() - saved >= self._files.save_seconds:
                self._save(state, number, losses)
                saved = time.perf_counter()
            self._tell(result, self.totals.tokens - at_start, time.perf_counter() - began)
            yield result

    def _begin(self, saved: SavedState | None, number: int) -> TokenCursor:
        """The text from the next chunk on, the model where it was."""
        self._reader.begin(self.choice)
        geometry = self.choice.geometry
        alone = self.choice.carry is CarriedContext.NONE
        if saved is None or alone or self._loads(saved):
            return self._tape(geometry.span(number).first)
        return self._read_again(number)

    def _read_again(self, number: int) -> TokenCursor:
        """The same, by feeding the text from its beginning; states are not kept of it."""
        self._reader.forget()
        self._reader.begin(self.choice)
        tape = self._tape(0)
        for index in range(number):
            span = self.choice.geometry.span(index)
            self._reader.replay(tape.read(span.first, span.stop)[:-1], self.choice)
        return tape

    def _loads(self, saved: SavedState) -> bool:
        """Whether the model goes on from what was saved; else the text has to be read again."""
        return saved.rest is not None and self._runner.load(saved.tensors, saved.rest)

    def _tape(self, start: int) -> TokenCursor:
        return TokenCursor(self.text, start, self._settings.max_tokens, self._runner.vocab)

    def _save(self, state: Path, number: int, losses: TokenLosses | None) -> None:
        size = 0 if losses is None else losses.flush()
        tensors, rest = self._kept() or ({}, None)
        SavedState(self._identity, self.totals, number, size, tensors, rest).write(state)

    def _kept(self) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
        """What the model keeps of the text, if that is needed and small enough to be saved."""
        if (
            self.choice.carry is CarriedContext.NONE
            or self._runner.carried_bytes > MOST_SAVED_BYTES
        ):
            return None
        return self._runner.export()

    def _tell(self, result: ChunkResult, tokens: int, seconds: float) -> None:
        if self._told is None:
            return
        limit, length = self._settings.max_tokens, self.text.length
        if length is not None and limit is not None:
            length = min(length, limit)
        left = None if length is None else (length - result.stop) * seconds / max(tokens, 1)
        self._told(ReadingProgress(result, self.totals, result.stop, length, left))


def refuse_short(name: str, tokens: int, asked: int | None) -> None:
    """Refuse a text that has no chunk, or less than the chunk that was asked for.

    Args:
        name: What the text is called.
        tokens: Of the text, or of its first chunk.
        asked: Tokens of a chunk, if the user says so.

    Raises:
        EvaluationError: it is too short.
    """
    if tokens == 0:
        raise TokenSourceError(f"source = {name} is empty.\n  Give a text of two tokens or more.")
    if tokens == 1:
        raise TokenSourceError(
            f"source = {name} has one token, and the first token of a text is not predicted.\n"
            "  Give a text of two tokens or more."
        )
    if asked is not None and tokens < asked:
        raise EvaluationError(
            f"source = {name} has {tokens} tokens, fewer than chunk_size = {asked}.\n"
            f"  Set chunk_size = {tokens} or less, or leave it unset."
        )
