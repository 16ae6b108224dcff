"""Evaluates a text of any length, chunk by chunk, and says what each number means.

What is carried from chunk to chunk is chosen by the user, or is the most exact context that fits;
see docs/evaluation.md. Knows nothing about Ray: a chunk can be evaluated anywhere.
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
from ray_abliterate.evaluation.streaming.stream import (
    SAVE_SECONDS,
    Stream,
    StreamedText,
    StreamOptions,
)
from ray_abliterate.evaluation.streaming.token_sources import TokenSource
from ray_abliterate.model.fingerprint import weights_fingerprint
from ray_abliterate.model.language_model import LanguageModel


class StreamingEvaluator:
    """Evaluates texts with one model, in chunks.

    Attributes:
        capabilities: What the model can carry, as a check of the model itself has shown.
        position_limit: Number of positions that the model has, if there is a limit.
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
        """Check what the model can carry.

        Its parameters are the settings of an evaluation, which users give by name.

        Args:
            model: A causal language model of transformers, a `LanguageModel`, or a model that
                carries its own state (`StatefulModel`).
            carry: What a chunk knows of the text before it; the most exact that fits if unset.
            chunk_size: Tokens of a chunk, the overlap included. If unset, as many as fit into
                memory; at most 2048 for independent chunks, whose size is part of the result.
            overlap: Tokens of an independent chunk that are context only; a quarter if unset.
            window: Tokens that attention reaches back to with carry = window; 1024 if unset.
            max_tokens: Tokens of a text that count; all if unset.
            vocab: Number of token ids of a model that carries its own state, if it has no
                `config.vocab_size`.
            states: Cache of hidden states, with which a model whose lower blocks are unchanged
                reads a text again from the first changed block on.
            states_at: Blocks whose inputs are cached: those at which edits of later models begin.

        Raises:
            EvaluationError: a setting is out of range, or contradicts another one.
            UnsupportedCarry: the model can't carry this context.
        """
        module = model.module if isinstance(model, LanguageModel) else model
        self._module, self._states, self._states_at = module, states, tuple(states_at)
        settings = StreamingSettings(parse_carry(carry), chunk_size, overlap, window, max_tokens)
        self._runner = _runner_for(module, vocab)
        self._config: Any = getattr(module, "config", None)
        self.position_limit = position_limit(module)
        self.capabilities = check_capabilities(self._runner, self.position_limit)
        self._apply(settings)

    def _apply(self, settings: StreamingSettings) -> None:
        name, sizes = type(self._module).__name__, PassSize(self._module, self._runner.device)
        self._settings = settings
        self._reader = ChunkReader(
            self._runner, name, self.capabilities, sizes, self.position_limit
        )
        self._chooser = CarryChooser(
            self._module, self._runner.device, self.capabilities, settings, sizes.max_tokens
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
        """Return an evaluator of the same model with other settings, without a second check.

        The two share the model, so only one of them may be reading at a time. The parameters are
        those of the constructor.

        Raises:
            EvaluationError: a setting is out of range, or contradicts another one.
            UnsupportedCarry: the model can't carry this context.
        """
        other = copy.copy(self)
        other._states, other._states_at = states, tuple(states_at)
        other._apply(StreamingSettings(parse_carry(carry), chunk_size, overlap, window, max_tokens))
        return other

    def choose(self, length: int | None) -> CarryChoice:
        """Choose how a text of `length` tokens is evaluated; None if its length is unknown.

        Raises:
            EvaluationError: the settings contradict each other.
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
        """Return the chunks of a text, to iterate over; `totals` are those of the chunks so far.

        Its parameters are options that users give by name.

        Args:
            source: A `TokenSource`, or what `open_source` takes.
            tokenizer: Makes tokens of texts.
            state: File in which the evaluation is saved, and from which it resumes if it exists;
                deleted when the text has been read to its end.
            token_losses: Arrow file for the losses of single tokens.
            on_progress: Called after each chunk.
            save_seconds: Time between two saves.
            first_wanted: Number of the first chunk that the caller lacks: a saved state beyond it
                is not used. Earlier chunks may come again.

        Raises:
            EvaluationError: the text can't be evaluated; the message says why.
        """
        text = open_source(source, tokenizer)
        streamed = self._streamed(text)
        options = StreamOptions(
            _path(state), _path(token_losses), on_progress, save_seconds, first_wanted
        )
        return Stream(
            streamed,
            self._reader,
            weights_fingerprint(self._module, "state"),
            options,
            lambda: self._open_states(streamed),
        )

    def _streamed(self, text: TokenSource) -> StreamedText:
        return StreamedText(text, self.choose(self.length(text)), self._settings)

    def _open_states(self, streamed: StreamedText) -> TextStates | None:
        """Open the cached states of a text, if there is a cache and they can be used."""
        runner, choice = self._runner, streamed.choice
        # a text whose chunks depend on each other may have to be read once more from its beginning
        readable_again = choice.carry is CarriedContext.NONE or streamed.source.fingerprint
        if self._states is None or not isinstance(runner, ModuleRunner) or not readable_again:
            return None
        if not runner.blocks or has_hooks(self._module):
            return None
        keys = layer_keys(self._module, runner.blocks)
        return TextStates(
            self._states, keys, self._states_at, choice, partial(can_begin_at, runner)
        )

    def evaluate(self, source: Any, **options: Any) -> Totals:
        """Return the totals of a whole text; options are those of `stream`."""
        chunks = self.stream(source, **options)
        for _ in chunks:
            pass
        return chunks.totals

    def chunk(
        self, source: Any, index: int, *, tokenizer: Any = None, warm_up: int | None = None
    ) -> ChunkResult:
        """Return the result of chunk number `index` alone; see `stretch`.

        Raises:
            TokenSourceError: the text has no such chunk.
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
        """Yield `count` chunks from number `first` on, with the results that `stream` has for them.

        Any process may compute any stretch of a text. With carry = none it reads its own chunks and
        nothing else. With window, tokens before the first chunk are fed without their losses:
        `layers * (window - 1)` of them reach as far back as any layer sees, so that results are
        those of the stream but for rounding; with fewer they are close. A recurrent state has no
        such reach: with state and kv, and with a window in a model that also has a recurrent state,
        all of the text before is fed.

        Args:
            source: A `TokenSource`, or what `open_source` takes.
            first: Number of the first chunk.
            count: Number of chunks; fewer where the text ends.
            tokenizer: Makes tokens of texts.
            warm_up: Tokens that are fed before the first chunk, for carry = window.
        """
        streamed = self._streamed(open_source(source, tokenizer))
        choice = streamed.choice
        span = choice.geometry.span(first)
        before = self._tokens_before(choice, span, warm_up)
        cursor = streamed.cursor(span.first - before, self._runner.vocab)
        self._reader.begin(choice, span.first - before)
        context = cursor.read(span.first - before, span.first)
        if len(context) < before:
            return
        self._reader.replay(context, choice)
        for index in range(first, first + count):
            span = choice.geometry.span(index)
            ids = cursor.read(span.first, span.stop)
            if len(ids) < 2 or span.first + len(ids) <= span.start:
                return
            yield self._reader.read(span, ids, choice)[0]

    def warm_up(self, choice: CarryChoice) -> int | None:
        """Return how many tokens are fed before a stretch; None if it is all of the text."""
        if choice.carry is CarriedContext.NONE:
            return 0
        if choice.window is None or self.capabilities.cache_layers.recurrent:
            return None
        layers = int(self._config.get_text_config(decoder=True).num_hidden_layers)
        return layers * (choice.window - 1)

    def _tokens_before(self, choice: CarryChoice, span: TokenSpan, warm_up: int | None) -> int:
        """Return how many tokens are fed before a stretch that begins at `span`."""
        most = self.warm_up(choice)
        if warm_up is not None and choice.carry is CarriedContext.WINDOW:
            most = warm_up
        return span.first if most is None else min(span.first, most)

    def length(self, text: TokenSource) -> int | None:
        """Return how many tokens of a text count, if that is known before it is read."""
        limit = self._settings.max_tokens
        if text.length is None or limit is None:
            return text.length
        return min(text.length, limit)


def _runner_for(model: Any, vocab: int | None) -> Runner:
    if isinstance(model, StatefulModel):
        configured = getattr(getattr(model, "config", None), "vocab_size", None)
        if vocab is None and configured is None:
            raise EvaluationError(
                f"vocab is not set, and {type(model).__name__} has no config.vocab_size.\n"
                "  Set vocab to the number of its token ids."
            )
        return StatefulRunner(model, vocab or int(configured or 0))
    if not hasattr(model, "get_input_embeddings"):
        raise EvaluationError(
            f"model is a {type(model).__name__}: no causal language model of transformers, and "
            "without get_state, set_state and reset_state.\n  Give a model that is either."
        )
    return ModuleRunner(model)


def _path(given: Path | str | None) -> Path | None:
    return None if given is None else Path(given)
