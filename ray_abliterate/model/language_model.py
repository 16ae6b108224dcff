"""A language model that reads and answers prompts: residuals, logits, greedy answers.

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
from ray_abliterate.errors import ModelError
from ray_abliterate.model.batched_model import BatchedModel, PromptRow
from ray_abliterate.model.chat_format import ChatFormat, close_thinking, common_prefix
from ray_abliterate.model.component_outputs import ComponentModules
from ray_abliterate.model.engine.batch import Batch
from ray_abliterate.model.engine.generation_state import GeneratedTokens
from ray_abliterate.model.loading import load_model
from ray_abliterate.model.padded_model import CallbackCriterion, ObserverCriterion, Sampling
from ray_abliterate.model.prefix_cache import Prefix
from ray_abliterate.model.text_model import Answer, AnswerObserver
from ray_abliterate.recipe import ModelSettings

PREFIX_TOKENS = 16
"""Tokens of the answers in which a common prefix is looked for."""


class LanguageModel(BatchedModel):
    """A causal language model with its chat format.

    Attributes:
        chat: Turns prompts into tokens.
        tokens_written: Tokens of all answers since the model was loaded.
        unedited: Opens a block in which the model is as it was loaded; set by whoever edits it.
    """

    def __init__(
        self,
        module: nn.Module,
        tokenizer: Any,
        settings: ModelSettings | None = None,
        batch_size: int | None = None,
    ) -> None:
        """
        Args:
            module: The transformers model.
            tokenizer: Its tokenizer.
            settings: The recipe's, for the chat format and the share of an accelerator; the
                recipe's defaults if None.
            batch_size: Rows of a batch; by memory if None.
        """
        settings = settings or ModelSettings(name=type(module).__name__)
        self.chat = ChatFormat(tokenizer, settings)
        self.tokens_written = 0
        self.unedited: Callable[[], AbstractContextManager[None]] = nullcontext
        self._encoded: dict[Any, list[PromptRow]] = {}
        ends = _end_tokens(module, tokenizer)
        pad = _pad_token(tokenizer, ends)
        share = min(settings.gpus_per_replica or 1.0, 1.0)
        super().__init__(module, ends, pad, self.chat, batch_size, share)

    @classmethod
    def load(
        cls, source: str, settings: ModelSettings | None = None, batch_size: int | None = None
    ) -> "LanguageModel":
        """Load a model from a folder or the Hub; `loading.load` says what can go wrong.

        Args:
            source: Folder or Hub name.
            settings: Revision, dtype, device, and what is allowed; the recipe's defaults if None.
            batch_size: Rows of a batch; by memory if None.
        """
        settings = settings or ModelSettings(name=source)
        module, tokenizer = load_model(source, settings)
        return cls(module, tokenizer, settings, batch_size)

    def encode(self, prompts: Sequence[Prompt]) -> list[PromptRow]:
        """Return the token ids of each prompt, followed by the response prefix."""
        key = tuple(prompts), self.response_prefix
        if key not in self._encoded:
            rows = [[*self.chat.encode(prompt), *self.response_prefix] for prompt in prompts]
            self._encoded[key] = rows
        return self._encoded[key]

    @contextmanager
    def without_storing(self) -> Iterator[None]:
        """Store no tokens and no states inside the block, whose questions are not asked again."""
        encoded, stored = self._encoded, self._stored_batches
        self._encoded, self._stored_batches = {}, {}
        try:
            yield
        finally:
            self._encoded, self._stored_batches = encoded, stored

    # What a forward pass gives

    def tokens(self, text: str) -> PromptRow:
        """Return the token ids of a text as an answer begins with it; no special tokens."""
        return self.chat.opening(text)

    @torch.inference_mode()
    def residuals(
        self, prompts: Sequence[Prompt], positions: int = 1, components: ComponentModules = ()
    ) -> Float[Tensor, "prompt layer hidden"]:
        """Return every block's output at the last token, float32 on the CPU.

        Args:
            prompts: The prompts.
            positions: How many tokens, counted from the end. All blocks at the last token come
                first, then all at the one before it, and so on. Each is read at the end of a
                prompt that is cut there, which a causal model can't tell from the whole one.
            components: Modules whose outputs come after those of the blocks, at each token.

        Raises:
            ModelError: the prompts don't end with so many tokens in common.
        """
        rows = self.encode(prompts)
        backwards = zip(*map(reversed, rows), strict=False)
        ends = takewhile(lambda tokens: len(set(tokens)) == 1, backwards)
        if positions > 1 and (shared := len(list(ends))) < positions:
            raise ModelError(
                f"direction.positions = {positions}, but prompts end with {shared} tokens that all "
                "of them share.\n  Before those stand their own words, which tell the sets apart "
                f"by themselves. Set it to {max(shared, 1)} or less."
            )
        cut = ([row[: len(row) - back] for row in rows] for back in range(positions))
        return torch.cat([self._last_residuals(rows, components) for rows in cut], dim=1)

    def _last_residuals(
        self, rows: list[PromptRow], components: ComponentModules
    ) -> Float[Tensor, "prompt layer hidden"]:
        residuals: list[Tensor] = [torch.empty(0)] * len(rows)  # each (layer, hidden)
        prefix = cache(partial(self.padded.shared_prefix, rows))

        def work(indices: list[int], batch: Batch | None) -> None:
            if batch is not None and self._engine is not None:
                of_batch = self._engine.residuals(batch, components).cpu()
            else:
                some = [rows[i] for i in indices]
                of_batch = self.padded.residuals(some, prefix(), components)
            for place, index in enumerate(indices):
                residuals[index] = of_batch[place]

        self._for_each_batch("residuals", rows, work, self._tuning.read_rows, None)
        return torch.stack(residuals)

    def next_token_logits(self, prompts: Sequence[Prompt]) -> Float[Tensor, "prompt vocab"]:
        """Return the raw logits after each prompt, float32 on the CPU."""
        return torch.stack([logits[0] for logits in self.logits_by_edit(prompts, None)[0]])

    def continuation_logits(
        self, prompts: Sequence[Prompt], continuations: Sequence[Sequence[int]]
    ) -> list[Float[Tensor, "token vocab"]]:
        """Return the raw logits that predict each token of continuations, float32 on the CPU.

        The continuations are fed to the model (teacher forcing), so that two models are compared in
        the same contexts.
        """
        return self.logits_by_edit(prompts, continuations)[0]

    def answer(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        observer: AnswerObserver | None = None,
    ) -> list[Answer]:
        """Return greedy answers; each ends as soon as the observer has decided its verdict."""
        return self.answers_by_edit(prompts, max_new_tokens, [observer])[0]

    def continue_greedily(self, prompts: Sequence[Prompt], tokens: int) -> list[PromptRow]:
        """Return the token ids of greedy answers, up to and with the end token."""
        return [answer.tokens for answer in self.tokens_by_edit(prompts, tokens)[0]]

    def sample(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        temperature: float,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[Answer]:
        """Return sampled answers, one prompt at a time.

        They are the same for the same seed, prompt, and place of the prompt.
        """
        answers = []
        for number, row in enumerate(self.encode(prompts)):
            sampling = Sampling(temperature, top_p, seed + number)
            (tokens,) = self.padded.generate([row], max_new_tokens, Prefix(), sampling=sampling)
            answers.append(Answer(self.chat.decode(tokens), len(tokens), False))
            self.tokens_written += len(tokens)
        return answers

    def reply(
        self,
        turns: Sequence[dict[str, str]],
        max_new_tokens: int,
        on_text: Callable[[str], bool] | None = None,
    ) -> str:
        """Return the greedy next turn of a conversation.

        Args:
            turns: The conversation until now.
            max_new_tokens: The most tokens of the turn.
            on_text: Is called with the text of each token as it comes, all of them together the
                turn (but for what ends in the middle of a character); returning true ends the turn.
        """
        ids = [*self.chat.ids(self.chat.conversation(turns)), *self.response_prefix]
        stream = self.chat.stream()
        stop = None
        if on_text is not None:
            stop = CallbackCriterion(lambda token: on_text(stream.push(token)))
        return self.chat.decode(self.padded.generate([ids], max_new_tokens, Prefix(), stop)[0])

    def find_response_prefix(self, prompts: Sequence[Prompt]) -> tuple[int, ...]:
        """Return the tokens that all answers begin with (a closed thinking block, say).

        Look for them on prompts of both sets, and set them as `response_prefix`: answers begin to
        differ after them.
        """
        answers = self.continue_greedily(prompts, PREFIX_TOKENS)
        return close_thinking(common_prefix(answers), self.chat)

    # The same for several edits that share the passes; edit 0 alone is the model as it is

    @torch.inference_mode()
    def logits_by_edit(
        self,
        prompts: Sequence[Prompt],
        continuations: Sequence[Sequence[int]] | None,
        _observers: Sequence[None] = (None,),
        edits: Sequence[int] = (0,),
    ) -> list[list[Float[Tensor, "token vocab"]]]:
        """Return `continuation_logits` by edit and prompt; None asks for the first token only."""
        counts = [1] * len(prompts) if continuations is None else list(map(len, continuations))
        logits = [[torch.empty(0)] * len(prompts) for _ in edits]
        rows = self._rows_with(prompts, continuations)
        prefix = cache(partial(self.padded.shared_prefix, self.encode(prompts)))

        def work(indices: list[int], batch: Batch | None) -> None:
            last = [counts[i] for i in indices]
            if batch is not None and self._engine is not None:
                of_batch = self._engine.logits(batch, last, edits)
                for of_edit, values in zip(logits, of_batch, strict=True):
                    for index, value in zip(indices, values, strict=True):
                        of_edit[index] = value.float().cpu()
                return
            self._refuse_several(edits)
            some = [rows[i] for i in indices]
            block = self.padded.logits(some, max(last), prefix()).float().cpu()
            for place, index in enumerate(indices):  # block: (row, token, vocab)
                logits[0][index] = block[place, block.shape[1] - counts[index] :]

        size = self._tuning.read_rows
        self._for_each_batch(f"logits {counts}", rows, work, size, tuple(prompts))
        return logits

    def answers_by_edit(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        observers: Sequence[AnswerObserver | None],
        edits: Sequence[int] = (0,),
    ) -> list[list[Answer]]:
        """Return `answer` by edit, then by prompt; each edit has an observer of its own."""
        by_edit = self.tokens_by_edit(prompts, max_new_tokens, observers, edits)
        return [
            [Answer(self.chat.decode(a.tokens), len(a.tokens), a.stopped) for a in answers]
            for answers in by_edit
        ]

    def tokens_by_edit(
        self,
        prompts: Sequence[Prompt],
        limit: int,
        observers: Sequence[AnswerObserver | None] = (None,),
        edits: Sequence[int] = (0,),
    ) -> list[list[GeneratedTokens]]:
        """Return the tokens of greedy answers by edit, then by prompt.

        Args:
            prompts: The prompts.
            limit: The most tokens of an answer.
            observers: Read along, and may stop answers early; one for each edit.
            edits: Numbers of the edits that share the passes.
        """
        by_edit = [[GeneratedTokens([], False)] * len(prompts) for _ in edits]
        rows, observer = self.encode(prompts), observers[0]
        prefix = cache(partial(self.padded.shared_prefix, rows))

        def work(indices: list[int], batch: Batch | None) -> None:
            if batch is not None and self._engine is not None:
                of_batch = self._engine.answer(batch, limit, observers, indices, edits)
                for of_edit, answers in zip(by_edit, of_batch, strict=True):
                    for index, answer in zip(indices, answers, strict=True):
                        of_edit[index] = answer
                return
            self._refuse_several(edits)
            ends, stop = self.end_tokens, None
            if observer is not None:
                stop = ObserverCriterion(observer, indices, self.chat, ends, limit)
            some = [rows[i] for i in indices]
            for place, tokens in enumerate(self.padded.generate(some, limit, prefix(), stop)):
                cut = stop.decided_after.get(place) if stop else None
                tokens = tokens[:cut]
                ended = bool(tokens) and (tokens[-1] in ends or cut == limit)
                stopped = cut is not None and not ended
                by_edit[0][indices[place]] = GeneratedTokens(tokens, stopped)

        question, size = f"answers of {limit}", self._tuning.answer_rows
        self._for_each_batch(question, rows, work, size, tuple(prompts), growth=limit)
        self.tokens_written += sum(len(a.tokens) for answers in by_edit for a in answers)
        return by_edit

    def _rows_with(
        self, prompts: Sequence[Prompt], continuations: Sequence[Sequence[int]] | None
    ) -> list[PromptRow]:
        """Return the prompts, each followed by all but the last token of its continuation."""
        rows = self.encode(prompts)
        if continuations is None:
            return rows
        return [[*row, *list(c)[:-1]] for row, c in zip(rows, continuations, strict=True)]


def _end_tokens(module: Any, tokenizer: Any) -> tuple[int, ...]:
    """Return all tokens that end an answer, of the generation config and the tokenizer."""
    ends = getattr(getattr(module, "generation_config", None), "eos_token_id", None)
    if ends is None:
        ends = getattr(module.config, "eos_token_id", None)
    tokens = {ends} if isinstance(ends, int) else set(ends or ())
    if tokenizer.eos_token_id is not None:
        tokens.add(tokenizer.eos_token_id)
    return tuple(sorted(tokens))


def _pad_token(tokenizer: Any, end_tokens: Sequence[int]) -> int:
    """Return the padding token; any valid id will do, because padding is masked."""
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    return end_tokens[0] if end_tokens else 0
