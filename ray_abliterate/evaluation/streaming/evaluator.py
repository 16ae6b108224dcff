"""Evaluates a text of any length, chunk by chunk, and says what each number is of.

What is carried from chunk to chunk is chosen by the user, or the most exact that fits; see
docs/evaluation.md. Knows nothing about Ray: a chunk can be evaluated anywhere.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ray_abliterate.errors import EvaluationError, TokenSourceError
from ray_abliterate.evaluation.streaming.capability_check import can_begin_at, check_capabilities
from ray_abliterate.evaluation.streaming.carried_context import CarriedContext
from ray_abliterate.evaluation.streaming.carry_choice import (
    CarryChoice,
    CarryChooser,
    StreamingSettings,
    parse_carry,
    position_limit,
)
from ray_abliterate.evaluation.streaming.chunk_geometry import TokenSpan
from ray_abliterate.evaluation.streaming.chunk_reader import ChunkReader, PassSize
from ray_abliterate.evaluation.streaming.hidden_state_cache import (
    HiddenStateCache,
    TextStates,
    has_hooks,
    layer_keys,
)
from ray_abliterate.evaluation.streaming.open_source import open_source
from ray_abliterate.evaluation.streaming.results import ChunkResult, ReadingProgress, Totals
from ray_abliterate.evaluation.streaming.runners import (
    ModuleRunner,
    Runner,
    StatefulModel,
    StatefulRunner,
)
from ray_abliterate.evaluation.streaming.saved_state import fingerprint
from ray_abliterate.evaluation.streaming.stream import SAVE_SECONDS, Stream, StreamFiles
from ray_abliterate.evaluation.streaming.token_sources import TokenCursor, TokenSource
from ray_abliterate.model.language_model import LanguageModel


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
        carry: CarriedContext | str | None = None,
        chunk_size: int | None = None,
        overlap: int | None = None,
        window: int | None = None,
        max_tokens: int | None = None,
        vocab: int | None = None,
        states: HiddenStateCache | None = None,
        states_at: Sequence[int] = (),
    ) -> None:
        """
        Args:
            model: A causal language model of transformers, one that is loaded here, or one that
                carries its state itself (`StatefulModel`).
            carry: What a chunk knows of the text before it; the most exact that fits if unset.
            chunk_size: Tokens of a chunk, overlap included; by memory if unset, but 2048 at most
                for independent chunks, whose size is part of the result.
            overlap: Tokens of an independent chunk that are context only; a quarter if unset.
            window: Tokens that attention reaches back to with carry = window; 1024 if unset.
            max_tokens: Tokens of a text that count; all if unset.
            vocab: Ids of a model that carries its state itself, if it has no `config.vocab_size`.
            states: Where states in the middle of a model are kept, so that a model whose lower
                blocks are the same reads a text again from there on.
            states_at: Blocks whose inputs are kept: those at which edits of later models begin.

        Raises:
            EvaluationError: a setting can't be.
            UnsupportedCarry: the model can't carry this.
        """
        module = model.module if isinstance(model, LanguageModel) else model
        self._module, self._states, self._states_at = module, states, tuple(states_at)
        settings = StreamingSettings(parse_carry(carry), chunk_size, overlap, window, max_tokens)
        self._runner = _runner(module, vocab)
        self._config: Any = getattr(module, "config", None)
        self.positions = position_limit(module)
        self.findings = check_capabilities(self._runner, self.positions)
        self._use(settings)

    def _use(self, settings: StreamingSettings) -> None:
        name, sizes = type(self._module).__name__, PassSize(self._module, self._runner.device)
        self._settings = settings
        self._reader = ChunkReader(self._runner, name, self.findings, sizes, self.positions)
        self._chooser = CarryChooser(
            self._module, self._runner.device, self.findings, settings, sizes.most
        )

    def with_settings(
        self,
        *,
        carry: CarriedContext | str | None = None,
        chunk_size: int | None = None,
        overlap: int | None = None,
        window: int | None = None,
        max_tokens: int | None = None,
        states: HiddenStateCache | None = None,
        states_at: Sequence[int] = (),
    ) -> "StreamingEvaluator":
        """Another one of the same model, which is not examined again; one is used at a time.

        Raises:
            EvaluationError: a setting can't be.
            UnsupportedCarry: the model can't carry this.
        """
        other = copy.copy(self)
        other._states, other._states_at = states, tuple(states_at)
        other._use(StreamingSettings(parse_carry(carry), chunk_size, overlap, window, max_tokens))
        return other

    def choose(self, length: int | None) -> CarryChoice:
        """How a text of so many tokens is evaluated; None if that is not known.

        Raises:
            EvaluationError: the settings can't be.
        """
        return self._chooser.choose(length)

    def stream(
        self,
        source: Any,
        *,
        tokenizer: Any = None,
        state: Path | str | None = None,
        token_losses: Path | str | None = None,
        on_progress: Callable[[ReadingProgress], None] | None = None,
        save_seconds: float = SAVE_SECONDS,
        first_wanted: int | None = None,
    ) -> Stream:
        """The chunks of a text, one after the other; totals are those until now.

        Args:
            source: A `TokenSource`, or what `open_source` takes.
            tokenizer: Makes tokens of texts.
            state: File that the evaluation is saved in, and goes on from if it is there; deleted
                when the text has ended.
            token_losses: Arrow file for the losses of single tokens.
            on_progress: Is told after each chunk.
            save_seconds: Time between two savings.
            first_wanted: Number of the first chunk that the caller lacks: a saved state beyond it
                is not used. Chunks before it may come again.

        Raises:
            EvaluationError: it can't be done; says why.
        """
        text = open_source(source, tokenizer)
        choice = self.choose(self.length(text))
        return Stream(
            text,
            choice,
            self._settings,
            self._runner,
            self._reader,
            fingerprint(self._module),
            StreamFiles(_path(state), _path(token_losses), save_seconds, first_wanted),
            on_progress,
            lambda: self._kept(text, choice),
        )

    def _kept(self, text: TokenSource, choice: CarryChoice) -> TextStates | None:
        """States of a text that is about to be read, if they are kept and can be."""
        runner = self._runner
        again = (
            choice.carry is CarriedContext.NONE or text.fingerprint
        )  # it may have to be read once more
        if self._states is None or not isinstance(runner, ModuleRunner) or not again:
            return None
        if not runner.blocks or has_hooks(self._module):
            return None
        keys = layer_keys(self._module, runner.blocks)
        return TextStates(
            self._states, keys, self._states_at, choice, partial(can_begin_at, runner)
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
        """Chunk number `index` alone, see `stretch`.

        Raises:
            EvaluationError: the text has no such chunk.
        """
        text = open_source(source, tokenizer)
        for result in self.stretch(text, index, 1, warm_up=warm_up):
            return result
        geometry = self.choose(self.length(text)).geometry
        sizes = f"{geometry.chunk_size} tokens (overlap {geometry.overlap})"
        raise TokenSourceError(f"{text.name} has no chunk {index} of {sizes}.")

    def stretch(
        self,
        source: Any,
        first: int,
        count: int,
        *,
        tokenizer: Any = None,
        warm_up: int | None = None,
    ) -> Iterator[ChunkResult]:
        """So many chunks from number `first` on, as `stream` finds them; any process may compute
        any stretch.

        For carry = none that is all there is to it. For window, tokens before the first chunk are
        fed, without their losses: `layers * (window - 1)` of them reach as far back as any layer
        sees, so that the results are those of the stream but for rounding; with fewer they are
        close. A recurrent state has no such reach: beside a window, and for state and kv, all of
        the text before is fed.

        Args:
            source: A `TokenSource`, or what `open_source` takes.
            first: Number of the first chunk.
            count: How many; fewer where the text ends.
            tokenizer: Makes tokens of texts.
            warm_up: Tokens before the first chunk, for carry = window.
        """
        text = open_source(source, tokenizer)
        choice = self.choose(self.length(text))
        span = choice.geometry.span(first)
        before = self._before(choice, span, warm_up)
        tape = TokenCursor(text, span.first - before, self._settings.max_tokens, self._runner.vocab)
        self._reader.begin(choice, span.first - before)
        warm = tape.read(span.first - before, span.first)
        if len(warm) < before:
            return
        self._reader.replay(warm, choice)
        for index in range(first, first + count):
            span = choice.geometry.span(index)
            ids = tape.read(span.first, span.stop)
            if len(ids) < 2 or span.first + len(ids) <= span.start:
                return
            yield self._reader.measure(span, ids, choice)[0]

    def warm_up(self, choice: CarryChoice) -> int | None:
        """Tokens that are fed before a stretch; None if all of the text before it has to be."""
        if choice.carry is CarriedContext.NONE:
            return 0
        if choice.window is None or self.findings.memory.recurrent:
            return None
        layers = int(self._config.get_text_config(decoder=True).num_hidden_layers)
        return layers * (choice.window - 1)

    def _before(self, choice: CarryChoice, span: TokenSpan, warm_up: int | None) -> int:
        """Tokens that are fed before a stretch."""
        most = self.warm_up(choice)
        if warm_up is not None and choice.carry is CarriedContext.WINDOW:
            most = warm_up
        return span.first if most is None else min(span.first, most)

    def length(self, text: TokenSource) -> int | None:
        """Tokens of a text that count, if that is known before it is read."""
        limit = self._settings.max_tokens
        if text.length is None or limit is None:
            return text.length
        return min(text.length, limit)


def _runner(model: Any, vocab: int | None) -> Runner:
    if isinstance(model, StatefulModel):
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


def _path(given: Path | str | None) -> Path | None:
    return None if given is None else Path(given)
