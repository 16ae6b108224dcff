"""Evaluates a text of any length, chunk by chunk, and says what each number is of.

What is carried from chunk to chunk is chosen by the user, or the most exact that fits; see
docs/evaluation.md. Knows nothing about Ray: a chunk can be evaluated anywhere.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ray_abliterate.errors import EvaluationError, TokenSourceError, UnsupportedCarry
from ray_abliterate.grid import even, forget_garbage, free_bytes, is_out_of_memory
from ray_abliterate.model import LanguageModel
from ray_abliterate.streaming.carries import Carry, Geometry, Span
from ray_abliterate.streaming.checkpoint import Checkpoint, fingerprint
from ray_abliterate.streaming.memory import kept_bytes_per_token, tokens_per_pass
from ray_abliterate.streaming.opening import open_source
from ray_abliterate.streaming.results import ChunkResult, Progress, Totals
from ray_abliterate.streaming.runners import CarriesState, ModuleRunner, Runner, StatefulRunner
from ray_abliterate.streaming.self_check import SINGLE, examine
from ray_abliterate.streaming.sources import Tape, TokenSource
from ray_abliterate.streaming.token_losses import TokenLosses

log = logging.getLogger(__name__)

CHUNK = 2048
"""Tokens of an independent chunk: its size is part of the result, so it does not follow memory."""
OVERLAP_SHARE = 4
"""Of an independent chunk, one in so many tokens is context."""
WINDOW = 1024
SAVE_SECONDS = 30.0
MOST_SAVED_BYTES = 1 << 28
"""A larger cache is not saved: the text is read again to make it."""


@dataclass(frozen=True)
class Choice:
    """How a text is evaluated.

    Attributes:
        geometry: The carry, and where chunks lie.
        window: Tokens that attention reaches back to, if that is bounded.
        notes: Why, where it was not the user who chose.
    """

    geometry: Geometry
    window: int | None
    notes: tuple[str, ...]

    @property
    def carry(self) -> Carry:
        """What chunks hand on."""
        return self.geometry.carry


class StreamingEvaluator:
    """Evaluates texts with one model.

    Attributes:
        findings: What the model can carry; asked of the model itself.
        positions: Positions that the model has, if there is a table of them.
    """

    def __init__(
        self,
        model: Any,
        *,
        carry: Carry | str | None = None,
        chunk_size: int | None = None,
        overlap: int | None = None,
        window: int | None = None,
        max_tokens: int | None = None,
        vocab: int | None = None,
    ) -> None:
        """
        Args:
            model: A causal language model of transformers, one that is loaded here, or one that
                carries its state itself (`CarriesState`).
            carry: What a chunk knows of the text before it; the most exact that fits if unset.
            chunk_size: Tokens of a chunk, overlap included; by memory if unset, but 2048 at most
                for independent chunks, whose size is part of the result.
            overlap: Tokens of an independent chunk that are context only; a quarter if unset.
            window: Tokens that attention reaches back to with carry = window; 1024 if unset.
            max_tokens: Tokens of a text that count; all if unset.
            vocab: Ids of a model that carries its state itself, if it has no `config.vocab_size`.

        Raises:
            EvaluationError: a setting can't be.
            UnsupportedCarry: the model can't carry this.
        """
        self._module = model.module if isinstance(model, LanguageModel) else model
        self._carry = _carry(carry)
        self._chunk_size, self._overlap, self._window = chunk_size, overlap, window
        self._max_tokens = max_tokens
        for name, value, least in (("max_tokens", max_tokens, 2), ("window", window, 2)):
            if value is not None and value < least:
                raise EvaluationError(f"{name} = {value} is too few.\n  Set it to {least} or more.")
        self._runner = _runner(self._module, vocab)
        self._config: Any = getattr(self._module, "config", None)
        self.positions = _position_table(self._module)
        self.findings = examine(self._runner, self.positions)
        self._fingerprint = fingerprint(self._module)
        self._pass: int | None = None
        if self._carry is not None:
            self._refuse(self._carry)
            self.choose(None)  # settings that can't be are refused before a text is read

    # What is chosen

    def choose(self, length: int | None) -> Choice:
        """How a text of so many tokens is evaluated; None if that is not known.

        Raises:
            EvaluationError: the settings can't be.
        """
        notes = list(self.findings.notes)
        carry = self._carry
        if carry is None:
            carry, why = self._most_exact(length)
            notes.append(f"carry = {carry.value}: {why}")
        if self.findings.per_pass[carry] == 1:
            notes.append(f"carry = {carry.value} goes token by token: {SINGLE}")
        if self._window is not None and carry is not Carry.WINDOW:
            raise EvaluationError(
                f"window = {self._window} with carry = {carry.value}: nothing is bounded by it.\n"
                "  Set carry = window, or leave window unset."
            )
        window = None
        if carry is Carry.WINDOW:
            window = self._window or min(WINDOW, _trained(self._config) or WINDOW)
        return Choice(self._geometry(carry, window), window, tuple(notes))

    def _geometry(self, carry: Carry, window: int | None) -> Geometry:
        if carry is not Carry.NONE:
            size = self._chunk_size
            size = self._most_per_pass(window) if size is None else size
            return Geometry(carry, size, self._overlap or 0)
        most = min(CHUNK, _trained(self._config) or CHUNK)
        size = self._chunk_size
        size = max(most, 2 * (self._overlap or 0)) if size is None else size
        overlap = size // OVERLAP_SHARE if self._overlap is None else self._overlap
        return Geometry(carry, size, overlap)

    def _most_exact(self, length: int | None) -> tuple[Carry, str]:
        """The first of state, kv, window, none that the model can do and that fits."""
        able, memory = self.findings.per_pass, self.findings.memory
        if able.get(Carry.STATE) == 0:
            return Carry.STATE, "its state is exact and of constant size"
        if Carry.KV in able:
            if not memory.full:
                return Carry.KV, "exact; the model's own windows bound its cache"
            why = self._does_not_fit(length)
            if not why:
                return Carry.KV, "exact, and keys and values of the text fit"
        else:
            why = self.findings.refused.get(Carry.KV, "")
        if Carry.WINDOW in able and able[Carry.WINDOW] == 0 and not self.positions:
            return Carry.WINDOW, f"constant memory; kv would be exact, but {why}"
        return Carry.NONE, why or self.findings.refused.get(Carry.STATE, "nothing else is right")

    def _does_not_fit(self, length: int | None) -> str:
        if length is None:
            return "the length of the text is not known"
        limit = _trained(self._config)
        if limit and length > limit:
            return f"the text has {length} tokens, and the model was made for {limit}"
        size = next(self._module.parameters()).element_size()
        each = kept_bytes_per_token(
            self._config.get_text_config(decoder=True), self.findings.memory.full, size
        )
        free = free_bytes(self._runner.device)
        if each * length > free:
            return f"{each * length / 1e9:.1f} GB of keys and values don't fit in {free / 1e9:.1f}"
        return ""

    def _refuse(self, carry: Carry) -> None:
        if carry not in self.findings.per_pass:
            able = ", ".join(c.value for c in Carry if c in self.findings.per_pass)
            raise UnsupportedCarry(
                f"carry = {carry.value} with {type(self._module).__name__}: "
                f"{self.findings.refused[carry]}.\n  Set carry to one of: {able}."
            )

    def _most_per_pass(self, window: int | None) -> int:
        if self._pass is None:
            reach = window or _trained(self._config) or CHUNK
            self._pass = tokens_per_pass(self._module, self._runner.device, reach)
        return self._pass

    # A text

    def stream(
        self,
        source: Any,
        *,
        tokenizer: Any = None,
        state: Path | str | None = None,
        token_losses: Path | str | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        save_seconds: float = SAVE_SECONDS,
    ) -> "Stream":
        """The chunks of a text, one after the other; totals are those until now.

        Args:
            source: A `TokenSource`, or what `open_source` takes.
            tokenizer: Makes tokens of texts.
            state: File that the evaluation is saved in, and goes on from if it is there; deleted
                when the text has ended.
            token_losses: Arrow file for the losses of single tokens.
            on_progress: Is told after each chunk.
            save_seconds: Time between two savings.

        Raises:
            EvaluationError: it can't be done; says why.
        """
        text = open_source(source, tokenizer)
        choice = self.choose(self._length(text))
        return Stream(
            self, text, choice, _path(state), _path(token_losses), on_progress, save_seconds
        )

    def evaluate(self, source: Any, **options: Any) -> Totals:
        """The totals of a whole text; options are those of `stream`."""
        chunks = self.stream(source, **options)
        for _ in chunks:
            pass
        return chunks.totals

    def chunk(
        self, source: Any, index: int, *, tokenizer: Any = None, warm_up: int | None = None
    ) -> ChunkResult:
        """Chunk number `index` alone, as `stream` finds it; any process may compute any chunk.

        For carry = none that is all there is to it. For window, tokens before the chunk are fed
        first, without their losses: `layers * (window - 1)` of them reach as far back as any layer
        sees, so that the result is that of the stream but for rounding; with fewer it is close.
        A recurrent state has no such reach: beside a window, and for state and kv, all of the text
        before is fed.

        Args:
            source: A `TokenSource`, or what `open_source` takes.
            index: Number of the chunk.
            tokenizer: Makes tokens of texts.
            warm_up: Tokens before the chunk, for carry = window.

        Raises:
            EvaluationError: the text has no such chunk.
        """
        text = open_source(source, tokenizer)
        choice = self.choose(self._length(text))
        span = choice.geometry.span(index)
        before = self._before(choice, span, warm_up)
        tape = Tape(text, span.first - before, self._max_tokens, self._runner.vocab)
        self._set(choice)
        self._runner.begin(span.first - before)
        warm = tape.read(span.first - before, span.first)
        ids = tape.read(span.first, span.stop) if len(warm) == before else warm[:0]
        if len(ids) < 2 or span.first + len(ids) <= span.start:
            raise TokenSourceError(f"{text.name} has no chunk {index} of {_sizes(choice)}.")
        self.replay(warm, choice)
        return self.measure(span, ids, choice)[0]

    def _before(self, choice: Choice, span: Span, warm_up: int | None) -> int:
        """Tokens that are fed before a chunk that is computed alone."""
        if choice.carry is Carry.NONE:
            return 0
        recurrent = self.findings.memory.recurrent
        if choice.window is None or (recurrent and warm_up is None):
            return span.first
        if warm_up is None:
            layers = self._config.get_text_config(decoder=True).num_hidden_layers
            warm_up = layers * (choice.window - 1)
        return min(span.first, warm_up)

    def _length(self, text: TokenSource) -> int | None:
        known = [n for n in (text.length, self._max_tokens) if n is not None]
        return min(known) if text.length is not None else None

    # A chunk

    def begin(self, choice: Choice) -> None:
        """The model has seen nothing."""
        self._set(choice)
        self._runner.begin()

    def _set(self, choice: Choice) -> None:
        if isinstance(self._runner, ModuleRunner):
            self._runner.window = choice.window
            able = {Carry.KV, Carry.STATE} & set(self.findings.per_pass)
            whole = [self.findings.per_pass[carry] == 0 for carry in able]
            self._runner.splits = choice.carry is not Carry.NONE or any(whole)

    def replay(self, ids: Tensor, choice: Choice) -> None:
        """Feed tokens whose losses are not asked for."""
        size = self._size(choice, len(ids))
        for first in range(0, len(ids), size):
            self._runner.feed(ids[first : first + size], ids[:0])

    def measure(self, span: Span, ids: Tensor, choice: Choice) -> tuple[ChunkResult, Tensor]:
        """A chunk, and the losses of its own tokens; halved passes are tried if memory runs out.

        Raises:
            EvaluationError: a single token does not fit, or a loss is not finite.
        """
        self._refuse_far(span.first + len(ids), choice)
        if choice.carry is Carry.NONE:
            self._runner.begin()
        own = span.first + len(ids) - max(span.start, span.first + 1)
        started, kept = time.perf_counter(), self._runner.snapshot()
        size = self._size(choice, len(ids) - 1)
        while (found := self._in_passes(ids, own, size)) is None:
            size = self._halved(size, len(ids) - 1)
            self._runner.restore(kept)
            forget_garbage()
        del kept
        self._refuse_infinite(found, span)
        seconds = time.perf_counter() - started
        carried = 0 if choice.carry is Carry.NONE else self._runner.carried_bytes
        nats, passes = math.fsum(found.double().tolist()), -(-(len(ids) - 1) // size)
        stop = span.first + len(ids)
        result = ChunkResult(span.index, span.start, stop, own, nats, seconds, passes, carried)
        return result, found

    def _in_passes(self, ids: Tensor, own: int, size: int) -> Tensor | None:
        """Losses of the last `own` tokens; None if memory ran out."""
        count, found = len(ids) - 1, []
        size = even(count, size)  # a last pass of one token is other code in recurrent models
        try:
            for first in range(0, count, size):
                stop = min(first + size, count)
                targets = ids[max(first, count - own) + 1 : stop + 1]
                found.append(self._runner.feed(ids[first:stop], targets))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return None
        return torch.cat(found)

    def _size(self, choice: Choice, count: int) -> int:
        """Tokens of a pass."""
        if self.findings.per_pass[choice.carry] == 1:
            return 1
        if not self._runner.splits:
            return max(count, 1)
        most = self._most_per_pass(choice.window)
        if isinstance(self._runner, ModuleRunner) and not self._runner.head_slices:
            most = min(most, self._runner.rows)
        return max(1, min(count, most))

    def _halved(self, size: int, count: int) -> int:
        if size == 1 or not self._runner.splits:
            what = "a pass of one token" if size == 1 else f"a chunk of {count} tokens"
            raise EvaluationError(
                f"{what} does not fit into memory"
                + ("." if size == 1 else ", and the model can't take it in parts.")
                + "\n  Lower chunk_size, choose another carry, or give the model more memory."
            )
        self._pass = (size + 1) // 2
        log.warning("a pass of %d tokens does not fit; going on with %d", size, self._pass)
        return self._pass

    def _refuse_far(self, stop: int, choice: Choice) -> None:
        """Nothing is fed to a position that the model doesn't have."""
        if self.positions is None:
            return
        far = stop - 1 if choice.carry is not Carry.NONE else choice.geometry.chunk_size - 1
        if min(far, stop - 1) > self.positions:
            raise UnsupportedCarry(
                f"the text goes on to position {far}, and {type(self._module).__name__} has "
                f"{self.positions} positions.\n  Set carry = none with chunk_size = "
                f"{self.positions} or less, or max_tokens = {self.positions}."
            )

    @staticmethod
    def _refuse_infinite(losses: Tensor, span: Span) -> None:
        if not losses.isfinite().all():
            place = int((~losses.isfinite()).nonzero()[0])
            raise EvaluationError(
                f"the loss of token {max(span.start, 1) + place} is {float(losses[place])}.\n"
                "  Are the weights finite? Half precision may overflow; try dtype = float32."
            )

    # What a saved evaluation needs

    def identity(self, text: TokenSource, choice: Choice) -> dict[str, Any]:
        """What must be the same to go on."""
        return {
            "model": self._fingerprint,
            "source": text.fingerprint,
            "carry": choice.carry.value,
            "chunk_size": choice.geometry.chunk_size,
            "overlap": choice.geometry.overlap,
            "window": choice.window,
            "max_tokens": self._max_tokens,
        }

    def tape(self, text: TokenSource, start: int) -> Tape:
        """A text from a token on."""
        return Tape(text, start, self._max_tokens, self._runner.vocab)

    def kept(self) -> tuple[dict[str, Tensor], list[dict[str, Any]] | None]:
        """What the model keeps of the text, if that is small enough to be saved."""
        small = self._runner.carried_bytes <= MOST_SAVED_BYTES
        return (self._runner.export() if small else None) or ({}, None)

    def go_on(self, saved: Checkpoint) -> bool:
        """Continue from a saved evaluation; False if the text has to be read again."""
        return saved.rest is not None and self._runner.load(saved.tensors, saved.rest)

    @property
    def asked_chunk_size(self) -> int | None:
        """The chunk size that was asked for."""
        return self._chunk_size

    @property
    def token_limit(self) -> int | None:
        """Tokens of a text that count."""
        return self._max_tokens


class Stream:
    """One text's evaluation: iterate over its chunks.

    Attributes:
        choice: How it is evaluated.
        totals: Of all chunks until now.
    """

    def __init__(
        self,
        evaluator: StreamingEvaluator,
        text: TokenSource,
        choice: Choice,
        state: Path | None,
        token_losses: Path | None,
        on_progress: Callable[[Progress], None] | None,
        save_seconds: float,
    ) -> None:
        self.choice, self.text = choice, text
        self.totals = Totals(carry=choice.carry.value, notes=choice.notes)
        self._evaluator, self._state, self._losses_at = evaluator, state, token_losses
        self._told, self._save_seconds = on_progress, save_seconds
        self._identity = evaluator.identity(text, choice)
        self._chunks = self._run()
        for note in choice.notes:
            log.info("%s: %s", text.name, note)

    def __iter__(self) -> Iterator[ChunkResult]:
        return self._chunks

    def close(self) -> None:
        """Stop; what was saved stays."""
        self._chunks.close()  # type: ignore[attr-defined]

    def _run(self) -> Iterator[ChunkResult]:
        saved = None if self._state is None else Checkpoint.read(self._state, self._identity)
        number = saved.next_chunk if saved else 0
        self.totals = saved.totals if saved else self.totals
        tape = self._begin(saved, number)
        size = saved.losses_bytes if saved else 0
        losses = TokenLosses(self._losses_at, size) if self._losses_at else None
        whole = False
        try:
            yield from self._chunk_by_chunk(tape, number, losses)
            whole = True
        finally:
            if losses is not None:
                losses.close(whole)
        if self._state is not None:
            self._state.unlink(missing_ok=True)

    def _chunk_by_chunk(
        self, tape: Tape, number: int, losses: TokenLosses | None
    ) -> Iterator[ChunkResult]:
        at_start, began, saved = self.totals.tokens, time.perf_counter(), time.perf_counter()
        while True:
            span = self.choice.geometry.span(number)
            ids = tape.read(span.first, span.stop)
            if number == 0:
                self._refuse_short(len(ids))
            if len(ids) < 2 or span.first + len(ids) <= span.start:
                return
            result, found = self._evaluator.measure(span, ids, self.choice)
            self.totals = self.totals.plus(result)
            number += 1
            if losses is not None:
                losses.append(result.stop - result.tokens, ids[-result.tokens :], found)
            if self._state is not None and time.perf_counter() - saved >= self._save_seconds:
                self._save(self._state, number, losses)
                saved = time.perf_counter()
            self._tell(result, self.totals.tokens - at_start, time.perf_counter() - began)
            yield result

    def _begin(self, saved: Checkpoint | None, number: int) -> Tape:
        """The text from the next chunk on, the model where it was."""
        self._evaluator.begin(self.choice)
        first = self.choice.geometry.span(number).first
        alone = self.choice.carry is Carry.NONE
        if saved is None or alone or self._evaluator.go_on(saved):
            return self._evaluator.tape(self.text, first)
        self._evaluator.begin(self.choice)
        tape, geometry = self._evaluator.tape(self.text, 0), self.choice.geometry
        for index in range(number):
            span = geometry.span(index)
            self._evaluator.replay(tape.read(span.first, span.stop)[:-1], self.choice)
        return tape

    def _save(self, state: Path, number: int, losses: TokenLosses | None) -> None:
        size = 0 if losses is None else losses.flush()
        tensors, rest = self._evaluator.kept()
        if self.choice.carry is Carry.NONE:
            tensors, rest = {}, None
        Checkpoint(self._identity, self.totals, number, size, tensors, rest).write(state)

    def _tell(self, result: ChunkResult, tokens: int, seconds: float) -> None:
        if self._told is None:
            return
        limit, length = self._evaluator.token_limit, self.text.length
        if length is not None and limit is not None:
            length = min(length, limit)
        left = None if length is None else (length - result.stop) * seconds / max(tokens, 1)
        self._told(Progress(result, self.totals, result.stop, length, left))

    def _refuse_short(self, tokens: int) -> None:
        name, asked = self.text.name, self._evaluator.asked_chunk_size
        if tokens == 0:
            raise TokenSourceError(
                f"source = {name} is empty.\n  Give a text of two tokens or more."
            )
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


def _carry(given: Carry | str | None) -> Carry | None:
    try:
        return None if given is None else Carry(given)
    except ValueError:
        known = ", ".join(carry.value for carry in Carry)
        raise EvaluationError(f"carry = {given!r} is not one of: {known}.") from None


def _runner(model: Any, vocab: int | None) -> Runner:
    if isinstance(model, CarriesState):
        own = getattr(getattr(model, "config", None), "vocab_size", None)
        if vocab is None and own is None:
            raise EvaluationError(
                f"vocab is not set, and {type(model).__name__} has no config.vocab_size.\n"
                "  Set vocab to the number of its token ids."
            )
        return StatefulRunner(model, vocab or int(own or 0))
    if not hasattr(model, "get_input_embeddings"):
        raise EvaluationError(
            f"model is a {type(model).__name__}, no causal language model of transformers, and has "
            "no get_state, set_state and reset_state.\n  Give a model that has."
        )
    return ModuleRunner(model)


def _trained(config: Any) -> int | None:
    """Positions that a model was made for."""
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        found = getattr(text, name, None)
        if isinstance(found, int) and found > 0:
            return found
    return None


def _position_table(module: Any) -> int | None:
    """Positions beyond which a model can't be asked, or would be another one: those of a learned
    table, and those from which rotary frequencies change with the length of the text."""
    config: Any = getattr(module, "config", None)
    limit = _trained(config) if config is not None else None
    if limit is None:
        return None
    named = module.named_modules()
    if any("wpe" in name.split(".") or "embed_positions" in name for name, _ in named):
        return limit
    text = config.get_text_config(decoder=True)
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):
        return int(rope.get("original_max_position_embeddings") or limit)
    return None


def _path(given: Path | str | None) -> Path | None:
    return None if given is None else Path(given)


def _sizes(choice: Choice) -> str:
    geometry = choice.geometry
    return f"{geometry.chunk_size} tokens (overlap {geometry.overlap})"
