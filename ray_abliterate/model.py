"""A language model and what is asked of it: residuals, logits, greedy answers.

Prompts go through in a fixed grid of batches (sorted by length), so that results don't depend on
who computes them: packed and with everything reused (`engine.py`) where the model's attention
allows, in padded batches (`padded.py`) otherwise. Knows nothing about edits or scores.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from itertools import takewhile
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ray_abliterate.architecture import find_blocks
from ray_abliterate.chat_format import ChatFormat, close_thinking, common_prefix
from ray_abliterate.contributions import Places
from ray_abliterate.engine import Batch, Engine, Techniques
from ray_abliterate.errors import ModelError
from ray_abliterate.grid import (
    LEARNED_SHARE,
    Cost,
    Tuning,
    even,
    forget_garbage,
    free_bytes,
    is_out_of_memory,
    most_rows,
)
from ray_abliterate.linears import Upcast, faster_in_float32
from ray_abliterate.loading import load
from ray_abliterate.packed import NotPackable, PackedModel
from ray_abliterate.padded import (
    Decisions,
    Followed,
    PaddedModel,
    Sampling,
    probe_rows,
    same_logits,
)
from ray_abliterate.prompts import Prompt
from ray_abliterate.recipe import ModelSettings
from ray_abliterate.residuals import ResidualValues
from ray_abliterate.scoring import Answer, AnswerWatch
from ray_abliterate.shared_prefix import Prefix
from ray_abliterate.writing import Written

log = logging.getLogger(__name__)

DEFAULT_PROMPT, DEFAULT_ANSWER = 512, 256
"""Tokens that batches are made for until more is known."""
PREFIX_TOKENS = 16
"""Tokens of the answers among which a common prefix is looked for."""

Row = list[int]


class LanguageModel:
    """A causal language model with its chat format.

    Attributes:
        module: The transformers model.
        chat: How prompts become tokens.
        response_prefix: Tokens put after every prompt: what all answers begin with.
        blocks: The residual blocks of the text tower, in order.
        not_packable: Why the engine does not serve this model; empty if it does.
        techniques: What the engine may do to be fast.
        tokens_written: Tokens of answers, since it was loaded.
        original: Opens a block in which the model is as it was loaded; set by who edits it.
    """

    def __init__(
        self,
        module: nn.Module,
        tokenizer: Any,
        settings: ModelSettings,
        batch_size: int | None = None,
    ) -> None:
        self.module: Any = module
        self.chat = ChatFormat(tokenizer, settings)
        self.response_prefix: tuple[int, ...] = ()
        self.batch_size = batch_size
        self.upcast = Upcast(module) if faster_in_float32(module) else None
        self.blocks: Any = find_blocks(module)[1]
        self.end_tokens = _end_tokens(module, tokenizer)
        self._pad = _pad_token(tokenizer, self.end_tokens)
        self.padded = PaddedModel(module, list(self.blocks), self.end_tokens, self._pad)
        self.techniques = Techniques()
        self.tokens_written = 0
        self.original: Callable[[], AbstractContextManager[None]] = nullcontext
        self._encoded: dict[Any, list[Row]] = {}
        self._known: dict[Any, list[tuple[list[int], Batch | None]]] = {}
        self._engine, self.not_packable = self._try_engine()
        self.use(self.tune(DEFAULT_PROMPT, DEFAULT_ANSWER))

    @classmethod
    def load(
        cls, source: str, settings: ModelSettings, batch_size: int | None = None
    ) -> "LanguageModel":
        """Load from a folder or the Hub; see `loading.load` for what can go wrong.

        Args:
            source: Folder or Hub name.
            settings: How.
            batch_size: Rows of a batch; by memory if None.
        """
        module, tokenizer = load(source, settings)
        return cls(module, tokenizer, settings, batch_size)

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return self.padded.device

    def encode(self, prompts: Sequence[Prompt]) -> list[Row]:
        """Token ids of each prompt, the response prefix after it."""
        key = tuple(prompts), self.response_prefix
        if key not in self._encoded:
            rows = [[*self.chat.encode(prompt), *self.response_prefix] for prompt in prompts]
            self._encoded[key] = rows
        return self._encoded[key]

    # How it computes

    def tune(self, prompt: int, answer: int, tokens: int = 0, copies: int = 1) -> Tuning:
        """Batch sizes by memory, and whether drafts pay, by measurement.

        Args:
            prompt: Tokens of the longest prompt.
            answer: Tokens of the longest answer.
            tokens: Tokens of all prompts that trials evaluate.
            copies: Trials that share a pass.

        Raises:
            ModelError: not even one row fits.
        """
        free, cost, most = free_bytes(self.device), self.cost, most_rows(self.device)
        read = min(most, self.batch_size or cost.rows(free, prompt, 0, 1))
        write = min(most, self.batch_size or cost.rows(free, prompt, answer, copies))
        if not read or not write:
            raise ModelError(
                f"{copies} x {prompt} + {answer} tokens do not fit into the {free / 1e9:.1f} GB "
                "that are free.\n  Shorten prompts or answers, lower search.trials_per_pass, or "
                "give the replica more memory."
            )
        states = max(1, tokens) * cost.state * len(self.blocks)
        room = min(LEARNED_SHARE * self.module.num_parameters() * cost.size, free / 4)
        every = min(max(1, math.ceil(states / room)), len(self.blocks))
        return Tuning(read, write, every, self._drafts_pay() if tokens else False)

    def use(self, tuning: Tuning) -> None:
        """Compute so from now on."""
        self._tuning = tuning
        if self._engine is not None:
            self._engine.drafts = tuning.drafts
            self._engine.kept = range(tuning.state_every, len(self.blocks), tuning.state_every)

    @property
    def cost(self) -> Cost:
        """What rows cost in memory."""
        return Cost.of(self.module, self._engine.kept_bytes if self._engine else 0)

    def _drafts_pay(self) -> bool:
        """Whether four tokens of a row cost less than two steps of one: a step waits for weights,
        not for arithmetic."""
        if self._engine is None:
            return False
        seconds = []
        for length in (1, 4):
            rows = [[3 + i % 7] * length for i in range(min(self._tuning.answer_rows, 64))]
            batch, taken = Batch(list(rows)), []
            for _ in range(3):
                started = time.perf_counter()
                self._engine.logits(batch, [1] * len(rows))[0][0].cpu()
                taken.append(time.perf_counter() - started)
            seconds.append(min(taken))
        return seconds[1] < 2 * seconds[0]

    # What the base model computed, and what is edited now

    @contextmanager
    def learning(self) -> Iterator[None]:
        """The model is the base model in this block: what it computes is kept for later trials."""
        self._known.clear()
        if self._engine is None:
            yield
            return
        with self._engine.learning():
            yield

    @contextmanager
    def untouched_below(self, block: int) -> Iterator[None]:
        """Blocks below this one are the base model's in this block of code: not run again."""
        if self._engine is None:
            yield
            return
        self._engine.untouched = block
        try:
            yield
        finally:
            self._engine.untouched = 0

    @contextmanager
    def passing(self) -> Iterator[None]:
        """What is asked in this block is not asked again: nothing is kept of it after it."""
        encoded, known = self._encoded, self._known
        self._encoded, self._known = {}, {}
        try:
            yield
        finally:
            self._encoded, self._known = encoded, known

    @property
    def packed(self) -> PackedModel:
        """The packed passes, for edits that hook into them.

        Raises:
            ModelError: this model has none.
        """
        if self._engine is None:
            raise ModelError(f"the engine does not serve this model: {self.not_packable}")
        return self._engine.model

    # What a forward pass gives

    def tokens(self, text: str) -> Row:
        """Token ids of a text as an answer begins with it; no special tokens."""
        return self.chat.opening(text)

    @torch.inference_mode()
    def residuals(
        self, prompts: Sequence[Prompt], positions: int = 1, more: Places = ()
    ) -> ResidualValues:
        """Every block's output at the last token, float32 on the CPU, `"prompt layer hidden"`.

        Args:
            prompts: The prompts.
            positions: How many tokens, counted from the end; all blocks at the last token come
                first, then all at the one before it, and so on. Each is read at the end of a
                prompt that is cut there, which a causal model can't tell from the whole one.
            more: Modules whose outputs come after those of the blocks, at each token.

        Raises:
            ModelError: the prompts don't end with so many tokens in common.
        """
        rows = self.encode(prompts)
        backwards = zip(*map(reversed, rows), strict=False)
        ends = takewhile(lambda tokens: len(set(tokens)) == 1, backwards)
        if positions > 1 and (shared := len(list(ends))) < positions:
            raise ModelError(
                f"direction.positions = {positions}, but prompts end with {shared} tokens that "
                "they have in common;\n  before those stand their own words, which tell the sets "
                f"apart by themselves. Set it to {max(shared, 1)} or less."
            )
        cut = ([row[: len(row) - back] for row in rows] for back in range(positions))
        return torch.cat([self._last_residuals(rows, more) for rows in cut], dim=1)

    def _last_residuals(self, rows: list[Row], more: Places) -> ResidualValues:
        found: list[Tensor] = [torch.empty(0)] * len(rows)
        prefix = cache(partial(self.padded.shared, rows))

        def work(indices: list[int], batch: Batch | None) -> None:
            if batch is not None and self._engine is not None:
                values = self._engine.residuals(batch, more).cpu()
            else:
                some = [rows[i] for i in indices]
                values = self.padded.residuals(some, prefix(), more)
            for place, index in enumerate(indices):
                found[index] = values[place]

        self._each("residuals", rows, work, self._tuning.read_rows, None)
        return torch.stack(found)

    def next_token_logits(self, prompts: Sequence[Prompt]) -> Float[Tensor, "prompt vocab"]:
        """Raw logits after each prompt, float32 on the CPU."""
        return torch.stack([logits[0] for logits in self.logits_of(prompts, None)[0]])

    def continuation_logits(
        self, prompts: Sequence[Prompt], continuations: Sequence[Sequence[int]]
    ) -> list[Float[Tensor, "token vocab"]]:
        """Raw logits that predict each token of given continuations, float32 on the CPU.

        The continuation is fed to the model (teacher forcing), so two models are compared in the
        same contexts.
        """
        return self.logits_of(prompts, continuations)[0]

    def answer(
        self, prompts: Sequence[Prompt], max_new_tokens: int, watch: AnswerWatch | None = None
    ) -> list[Answer]:
        """Greedy answers. A row ends when its verdict is decided, a batch when all rows have."""
        return self.answers_of(prompts, max_new_tokens, [watch])[0]

    def continue_greedily(self, prompts: Sequence[Prompt], tokens: int) -> list[Row]:
        """Token ids of the greedy answers, up to and with the end token."""
        return [written.tokens for written in self.written_by(prompts, tokens)[0]]

    def sample(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        temperature: float,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[Answer]:
        """Sampled answers, one prompt at a time; the same for the same seed, prompt and place."""
        found = []
        for number, row in enumerate(self.encode(prompts)):
            sampling = Sampling(temperature, top_p, seed + number)
            (tokens,) = self.padded.generate([row], max_new_tokens, Prefix(), sampling=sampling)
            found.append(Answer(self.chat.decode(tokens), len(tokens), False))
            self.tokens_written += len(tokens)
        return found

    def reply(
        self,
        turns: Sequence[dict[str, str]],
        max_new_tokens: int,
        piece: Callable[[str], bool] | None = None,
    ) -> str:
        """The greedy next turn of a conversation.

        Args:
            turns: The conversation until now.
            max_new_tokens: Where the turn is cut.
            piece: Is given the text of each token as it comes, all of them together the turn
                (but for what ends in the middle of a character); true ends the turn.
        """
        ids = [*self.chat.ids(self.chat.conversation(turns)), *self.response_prefix]
        stream = self.chat.stream()
        follow = None
        if piece is not None:
            follow = Followed(lambda token: piece(stream.push(token)))
        return self.chat.decode(self.padded.generate([ids], max_new_tokens, Prefix(), follow)[0])

    def find_response_prefix(self, prompts: Sequence[Prompt]) -> tuple[int, ...]:
        """What all answers begin with (a closed thinking block, say), in tokens.

        To be looked for on prompts of both sets, and set as `response_prefix`: what follows it is
        where answers begin to differ.
        """
        answers = self.continue_greedily(prompts, PREFIX_TOKENS)
        return close_thinking(common_prefix(answers), self.chat)

    # The same for several edits that share the passes; edit 0 alone is the model as it is

    @torch.inference_mode()
    def logits_of(
        self,
        prompts: Sequence[Prompt],
        continuations: Sequence[Sequence[int]] | None,
        _watches: Sequence[None] = (None,),
        edits: Sequence[int] = (0,),
    ) -> list[list[Float[Tensor, "token vocab"]]]:
        """`continuation_logits` for each edit; `None` asks for the first token only."""
        asked = [1 if continuations is None else len(continuations[i]) for i in range(len(prompts))]
        found = [[torch.empty(0)] * len(prompts) for _ in edits]
        rows = self._fed(prompts, continuations)
        prefix = cache(partial(self.padded.shared, self.encode(prompts)))

        def work(indices: list[int], batch: Batch | None) -> None:
            counts = [asked[i] for i in indices]
            if batch is not None and self._engine is not None:
                logits = self._engine.logits(batch, counts, edits)
                for own, values in zip(found, logits, strict=True):
                    for index, value in zip(indices, values, strict=True):
                        own[index] = value.float().cpu()
                return
            self._one_at_a_time(edits)
            some = [rows[i] for i in indices]
            block = self.padded.logits(some, max(counts), prefix()).float().cpu()
            for place, index in enumerate(indices):
                found[0][index] = block[place, block.shape[1] - asked[index] :]

        self._each(f"logits {asked}", rows, work, self._tuning.read_rows, tuple(prompts))
        return found

    def answers_of(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        watches: Sequence[AnswerWatch | None],
        edits: Sequence[int] = (0,),
    ) -> list[list[Answer]]:
        """`answer` for each edit."""
        written = self.written_by(prompts, max_new_tokens, watches, edits)
        return [
            [Answer(self.chat.decode(w.tokens), len(w.tokens), w.stopped) for w in own]
            for own in written
        ]

    def written_by(
        self,
        prompts: Sequence[Prompt],
        limit: int,
        watches: Sequence[AnswerWatch | None] = (None,),
        edits: Sequence[int] = (0,),
    ) -> list[list[Written]]:
        """Tokens of each answer, and whether it was stopped before its end, for each edit."""
        found = [[Written([], False)] * len(prompts) for _ in edits]
        rows, watch = self.encode(prompts), watches[0]
        prefix = cache(partial(self.padded.shared, rows))

        def work(indices: list[int], batch: Batch | None) -> None:
            if batch is not None and self._engine is not None:
                written = self._engine.answer(batch, limit, watches, indices, edits)
                for own, answers in zip(found, written, strict=True):
                    for index, answer in zip(indices, answers, strict=True):
                        own[index] = answer
                return
            self._one_at_a_time(edits)
            ends = self.end_tokens
            stop = Decisions(watch, indices, self.chat, ends, limit) if watch else None
            some = [rows[i] for i in indices]
            for place, tokens in enumerate(self.padded.generate(some, limit, prefix(), stop)):
                cut = stop.decided_after.get(place) if stop else None
                kept = tokens[:cut]
                ended = bool(kept) and (kept[-1] in ends or cut == limit)
                found[0][indices[place]] = Written(kept, cut is not None and not ended)

        size = self._tuning.answer_rows
        self._each(f"answers of {limit}", rows, work, size, tuple(prompts), more=limit)
        self.tokens_written += sum(len(written.tokens) for own in found for written in own)
        return found

    def _one_at_a_time(self, edits: Sequence[int]) -> None:
        if len(edits) > 1:
            raise ModelError(
                "several trials can't share a pass on these prompts: "
                f"{self.not_packable or 'they outgrow the attention window'}.\n"
                "  Set search.trials_per_pass = 1."
            )

    # Batches

    def _each(
        self,
        kind: str,
        rows: Sequence[Row],
        work: Callable[[list[int], Batch | None], None],
        size: int,
        kept: Any,
        more: int = 0,
    ) -> None:
        """Work through a grid of rows, batch by batch; batches that don't fit are halved.

        Args:
            kind: What is asked.
            rows: Token ids.
            work: Computes the rows with these numbers, as a packed batch if there is one.
            size: Rows of a batch.
            kept: Names the rows; the grid, and what the base model computes for it, is kept under
                that name. None keeps nothing.
            more: Tokens that rows grow by.
        """
        if self._engine is not None:
            self._engine.techniques = self.techniques
        key = kind, kept, self.response_prefix, self.techniques.shared_prefix
        grid = self._known.get(key) or [
            (i, self._batch(rows, i, more)) for i in self._grid(rows, size)
        ]
        waiting, done = list(grid), []
        while waiting:
            indices, batch = waiting.pop(0)
            try:
                work(indices, batch)
            except (RuntimeError, MemoryError) as error:
                if len(indices) == 1 or not is_out_of_memory(error):
                    raise
                log.warning("%d rows do not fit; going on with half as many", len(indices))
                forget_garbage()
                half = (len(indices) + 1) // 2
                halves = indices[:half], indices[half:]
                waiting[:0] = [(i, self._batch(rows, i, more)) for i in halves]
            else:
                done.append((indices, batch))
        if kept is not None:
            self._known[key] = done

    def _batch(self, rows: Sequence[Row], indices: Sequence[int], more: int) -> Batch | None:
        """Rows for the engine, if it serves them."""
        some = [rows[i] for i in indices]
        if self._engine is None or max(map(len, some)) + more > self._reach:
            return None
        return self._engine.batch(some)

    def _fed(
        self, prompts: Sequence[Prompt], continuations: Sequence[Sequence[int]] | None
    ) -> list[Row]:
        """Prompts with all but the last token of their continuations."""
        rows = self.encode(prompts)
        if continuations is None:
            return rows
        return [[*row, *list(c)[:-1]] for row, c in zip(rows, continuations, strict=True)]

    def _grid(self, rows: Sequence[Row], size: int) -> Iterator[list[int]]:
        """Batches of row numbers: by length, then number; equal lengths only if padding harms."""
        size = even(len(rows), size) if self.batch_size is None else size
        order = sorted(range(len(rows)), key=lambda i: (len(rows[i]), i))
        batch: list[int] = []
        for index in order:
            full = len(batch) == size
            mixed = batch and len(rows[batch[0]]) != len(rows[index])
            if full or (mixed and not self.padded.pads_safely):
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch

    @property
    def _reach(self) -> float:
        """Positions that packed passes serve: up to an attention window that they don't know of."""
        window = _window(self.module.config)
        known = self._engine is not None and window in self._engine.windows
        return math.inf if window is None or known else window

    @torch.inference_mode()
    def _try_engine(self) -> tuple[Engine | None, str]:
        """The engine, if packed passes give this model's logits; else the reason why not."""
        if not self.padded.pads_safely:
            return None, "padding changes its output, so its state can't be cut into rows"
        try:
            packed = PackedModel(self.module, self.blocks)
            engine = Engine(packed, self.end_tokens, self.chat, len(self.blocks))
            rows = probe_rows(self.module, (12, 17), share=9)
            batch = engine.batch(rows)
            alone = self.padded.logits(rows[:1], 1, Prefix())[0, 0]
            same = same_logits(alone, engine.logits(batch, [1, 1])[0][0][0])
        except (NotPackable, RuntimeError, TypeError, AttributeError, KeyError) as error:
            return None, str(error).splitlines()[0]
        if not same:
            return None, "its attention gives other logits on packed rows"
        return engine, ""


def _window(config: Any) -> int | None:
    """Positions that the narrowest attention window spans, if there is one."""
    text = config.get_text_config(decoder=True)
    spans = [getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return min((span for span in spans if span), default=None)


def _end_tokens(module: Any, tokenizer: Any) -> tuple[int, ...]:
    """All tokens that end an answer, from the generation config and the tokenizer."""
    ends = getattr(getattr(module, "generation_config", None), "eos_token_id", None)
    if ends is None:
        ends = getattr(module.config, "eos_token_id", None)
    found = {ends} if isinstance(ends, int) else set(ends or ())
    if tokenizer.eos_token_id is not None:
        found.add(tokenizer.eos_token_id)
    return tuple(sorted(found))


def _pad_token(tokenizer: Any, end_tokens: Sequence[int]) -> int:
    """Any valid id will do: padding is masked."""
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    return end_tokens[0] if end_tokens else 0
