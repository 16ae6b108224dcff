"""A language model and what is asked of it: residuals, logits, greedy answers.

Prompts go through in a fixed grid of batches (`model/batched_model.py`), so that results don't
depend on who computes them: packed and with everything reused (`model/engine/engine.py`) where the
model's attention allows, in padded batches (`model/padded_model.py`) otherwise. Knows nothing about
edits or scores.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from itertools import takewhile
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ray_abliterate.data.prompts import Prompt
from ray_abliterate.directions.residuals.residual_set import ResidualValues
from ray_abliterate.errors import ModelError
from ray_abliterate.model.batched_model import BatchedModel, Row
from ray_abliterate.model.chat_format import ChatFormat, close_thinking, common_prefix
from ray_abliterate.model.component_outputs import Places
from ray_abliterate.model.engine.batch import Batch
from ray_abliterate.model.engine.generation_state import Written
from ray_abliterate.model.loading import load
from ray_abliterate.model.padded_model import Decisions, Followed, Sampling
from ray_abliterate.model.prefix_cache import Prefix
from ray_abliterate.recipe import ModelSettings
from ray_abliterate.search.score import Answer, AnswerWatch

PREFIX_TOKENS = 16
"""Tokens of the answers among which a common prefix is looked for."""


class LanguageModel(BatchedModel):
    """A causal language model with its chat format.

    Attributes:
        chat: How prompts become tokens.
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
        self.chat = ChatFormat(tokenizer, settings)
        self.tokens_written = 0
        self.original: Callable[[], AbstractContextManager[None]] = nullcontext
        self._encoded: dict[Any, list[Row]] = {}
        ends = _end_tokens(module, tokenizer)
        pad = _pad_token(tokenizer, ends)
        share = min(settings.gpus_per_replica or 1.0, 1.0)
        super().__init__(module, ends, pad, self.chat, batch_size, share)

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

    def encode(self, prompts: Sequence[Prompt]) -> list[Row]:
        """Token ids of each prompt, the response prefix after it."""
        key = tuple(prompts), self.response_prefix
        if key not in self._encoded:
            rows = [[*self.chat.encode(prompt), *self.response_prefix] for prompt in prompts]
            self._encoded[key] = rows
        return self._encoded[key]

    @contextmanager
    def passing(self) -> Iterator[None]:
        """What is asked in this block is not asked again: nothing is kept of it after it."""
        encoded, known = self._encoded, self._known
        self._encoded, self._known = {}, {}
        try:
            yield
        finally:
            self._encoded, self._known = encoded, known

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

    def _fed(
        self, prompts: Sequence[Prompt], continuations: Sequence[Sequence[int]] | None
    ) -> list[Row]:
        """Prompts with all but the last token of their continuations."""
        rows = self.encode(prompts)
        if continuations is None:
            return rows
        return [[*row, *list(c)[:-1]] for row, c in zip(rows, continuations, strict=True)]


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
