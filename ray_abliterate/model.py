"""A language model and what is asked of it: residuals, logits, greedy answers.

Prompts go through in a fixed grid of batches (sorted by length, `batch_size` rows each), so that
results don't depend on who computes them. Knows nothing about edits or scores.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ray_abliterate import shared_prefix
from ray_abliterate.architecture import find_blocks
from ray_abliterate.chat_format import ChatFormat, close_thinking, common_prefix
from ray_abliterate.loading import load
from ray_abliterate.prompts import Prompt
from ray_abliterate.recipe import ModelSettings
from ray_abliterate.residuals import ResidualValues
from ray_abliterate.scoring import Answer, AnswerWatch
from ray_abliterate.shared_prefix import Prefix

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
    """

    def __init__(
        self, module: nn.Module, tokenizer: Any, settings: ModelSettings, batch_size: int = 32
    ) -> None:
        self.module: Any = module
        self.chat = ChatFormat(tokenizer, settings)
        self.response_prefix: tuple[int, ...] = ()
        self.batch_size = batch_size
        self.blocks: Any = find_blocks(module)[1]
        self.end_tokens = _end_tokens(module, tokenizer)
        self._pad = _pad_token(tokenizer, self.end_tokens)
        self._takes = set(inspect.signature(module.forward).parameters)
        self.module.generation_config = _plain_generation(self.end_tokens, self._pad)
        self.pads_safely = self._unchanged((5, 12), share=0)
        self.shares_prefix = shared_prefix.can_share(module) and self._unchanged((12, 17), share=9)

    @classmethod
    def load(cls, source: str, settings: ModelSettings, batch_size: int = 32) -> "LanguageModel":
        """Load from a folder or the Hub; see `loading.load` for what can go wrong."""
        module, tokenizer = load(source, settings)
        return cls(module, tokenizer, settings, batch_size)

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        device: torch.device = self.module.get_input_embeddings().weight.device
        return device

    def encode(self, prompts: Sequence[Prompt]) -> list[Row]:
        """Token ids of each prompt, the response prefix after it."""
        return [[*self.chat.encode(prompt), *self.response_prefix] for prompt in prompts]

    # What a forward pass gives

    @torch.inference_mode()
    def residuals(self, prompts: Sequence[Prompt]) -> ResidualValues:
        """Every block's output at the last token, float32 on the CPU, `"prompt layer hidden"`."""
        found: list[Tensor | None] = [None] * len(prompts)
        rows = self.encode(prompts)
        prefix = self._shared(rows)
        for batch in self._grid(rows):
            with self._recorded() as outputs:
                self._forward([rows[i] for i in batch], 1, prefix)
            stacked = torch.stack([outputs[i] for i in range(len(self.blocks))], dim=1)
            for position, index in enumerate(batch):
                found[index] = stacked[position]
        return torch.stack([values for values in found if values is not None])

    @torch.inference_mode()
    def next_token_logits(self, prompts: Sequence[Prompt]) -> Float[Tensor, "prompt vocab"]:
        """Raw logits after each prompt, float32 on the CPU."""
        return torch.stack([logits[0] for logits in self.continuation_logits(prompts, None)])

    @torch.inference_mode()
    def continuation_logits(
        self, prompts: Sequence[Prompt], continuations: Sequence[Sequence[int]] | None
    ) -> list[Float[Tensor, "token vocab"]]:
        """Raw logits that predict each token of given continuations, float32 on the CPU.

        The continuation is fed to the model (teacher forcing), so two models are compared in the
        same contexts. `None` asks for the first token only.
        """
        starts = self.encode(prompts)
        asked = [1 if continuations is None else len(continuations[i]) for i in range(len(starts))]
        fed = [[] if continuations is None else list(c)[:-1] for c in continuations or starts]
        rows = [start + more for start, more in zip(starts, fed, strict=True)]
        found: list[Tensor] = [torch.empty(0)] * len(rows)
        prefix = self._shared(starts)
        for batch in self._grid(rows):
            keep = max(asked[i] for i in batch)
            logits = self._forward([rows[i] for i in batch], keep, prefix).float().cpu()
            for position, index in enumerate(batch):
                found[index] = logits[position, logits.shape[1] - asked[index] :]
        return found

    @torch.inference_mode()
    def answer(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        watch: AnswerWatch | None = None,
    ) -> list[Answer]:
        """Greedy answers. A batch ends when each row has ended, or is decided by its text."""
        found: list[Answer | None] = [None] * len(prompts)
        rows = self.encode(prompts)
        prefix = self._shared(rows)
        for batch in self._grid(rows):
            stop = _Decisions(self, watch, batch)
            tokens = self._generate([rows[i] for i in batch], max_new_tokens, prefix, stop)
            for position, index in enumerate(batch):
                cut = stop.decided_after.get(position)
                new = _until_end(tokens[position][:cut], self.end_tokens)
                ended = bool(new) and new[-1] in self.end_tokens
                stopped = cut is not None and not ended
                found[index] = Answer(self.chat.decode(new), len(new), stopped)
        return [answer for answer in found if answer is not None]

    def continue_greedily(self, prompts: Sequence[Prompt], tokens: int) -> list[Row]:
        """Token ids of the greedy answers, up to and with the end token."""
        found: list[Row] = [[] for _ in prompts]
        rows = self.encode(prompts)
        prefix = self._shared(rows)
        for batch in self._grid(rows):
            new = self._generate([rows[i] for i in batch], tokens, prefix)
            for position, index in enumerate(batch):
                found[index] = _until_end(new[position], self.end_tokens)
        return found

    @torch.inference_mode()
    def reply(self, turns: Sequence[dict[str, str]], max_new_tokens: int) -> str:
        """The greedy next turn of a conversation."""
        ids = self.chat.ids(self.chat.conversation(turns))
        new = self._generate([[*ids, *self.response_prefix]], max_new_tokens, Prefix())[0]
        return self.chat.decode(_until_end(new, self.end_tokens))

    def find_response_prefix(self, prompts: Sequence[Prompt]) -> tuple[int, ...]:
        """What all answers begin with (a closed thinking block, say), in tokens.

        To be looked for on prompts of both sets, and set as `response_prefix`: what follows it is
        where answers begin to differ.
        """
        answers = self.continue_greedily(prompts, PREFIX_TOKENS)
        return close_thinking(common_prefix(answers), self.chat)

    # Batches

    def _grid(self, rows: Sequence[Row]) -> Iterator[list[int]]:
        """Batches of row numbers: by length, then number; equal lengths only if padding harms."""
        order = sorted(range(len(rows)), key=lambda i: (len(rows[i]), i))
        batch: list[int] = []
        for index in order:
            full = len(batch) == self.batch_size
            uneven = batch and not self.pads_safely and len(rows[batch[0]]) != len(rows[index])
            if full or uneven:
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch

    def _shared(self, rows: Sequence[Row]) -> Prefix:
        """The beginning that all rows have in common, computed on the model as it is now."""
        length = shared_prefix.common_length(rows) if self.shares_prefix else 0
        if length < shared_prefix.WORTHWHILE_TOKENS:
            return Prefix()
        return shared_prefix.compute(self.module, rows[0][:length])

    def _tensors(self, rows: Sequence[Row], prefix: Prefix) -> dict[str, Any]:
        """Ids, mask and cache; padding goes between the prefix and the rest, so that every row's
        last token is at -1."""
        width, start = max(len(row) for row in rows), prefix.length
        gaps = [width - len(row) for row in rows]
        pairs = list(zip(rows, gaps, strict=True))
        ids = [[*row[:start], *[self._pad] * gap, *row[start:]] for row, gap in pairs]
        mask = [[1] * start + [0] * gap + [1] * (len(row) - start) for row, gap in pairs]
        tensors: dict[str, Any] = {
            "input_ids": torch.tensor(ids, device=self.device),
            "attention_mask": torch.tensor(mask, device=self.device),
        }
        if prefix.cache is not None:
            tensors["past_key_values"] = prefix.for_rows(len(rows))
        return tensors

    def _forward(
        self, rows: Sequence[Row], keep: int, prefix: Prefix
    ) -> Float[Tensor, "prompt token vocab"]:
        """Logits of the last `keep` positions."""
        inputs = self._tensors(rows, prefix)
        inputs["input_ids"] = inputs["input_ids"][:, prefix.length :]
        if "position_ids" in self._takes:
            positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp_min(0)
            inputs["position_ids"] = positions[:, prefix.length :]
        if "logits_to_keep" in self._takes:
            inputs["logits_to_keep"] = keep
        logits: Tensor = self.module(**inputs, use_cache=prefix.cache is not None).logits
        return logits[:, -keep:]

    def _generate(
        self,
        rows: Sequence[Row],
        max_new_tokens: int,
        prefix: Prefix,
        stop: "_Decisions | None" = None,
    ) -> list[Row]:
        inputs = self._tensors(rows, prefix)
        output = self.module.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            stopping_criteria=[stop] if stop and stop.watch else None,
        )
        new: list[Row] = output[:, inputs["input_ids"].shape[1] :].tolist()
        return new

    @contextmanager
    def _recorded(self) -> Iterator[dict[int, Tensor]]:
        """Collect each block's output at the last position while the body runs."""
        outputs: dict[int, Tensor] = {}

        def keep(layer: int) -> Callable[..., None]:
            def hook(_module: nn.Module, _args: Any, output: Any) -> None:
                hidden = output[0] if isinstance(output, tuple | list) else output
                outputs[layer] = hidden[:, -1].float().cpu()

            return hook

        handles = [block.register_forward_hook(keep(i)) for i, block in enumerate(self.blocks)]
        try:
            yield outputs
        finally:
            for handle in handles:
                handle.remove()

    @torch.inference_mode()
    def _unchanged(self, lengths: tuple[int, int], share: int) -> bool:
        """Whether a prompt's logits are the same alone and beside a longer one.

        Not so where padding leaks into a recurrent state; batches are then made of prompts of one
        length. With `share`, both begin with so many tokens, computed once. Rounding moves logits
        by less than 0.001 of their spread in float32, and 0.1 in half precision.
        """
        limit = self.module.get_input_embeddings().weight.shape[0] - 1
        rows = [[(7 * i + 1 + (i >= share) * n) % limit for i in range(n)] for n in lengths]
        prefix = shared_prefix.compute(self.module, rows[0][:share]) if share else Prefix()
        alone = self._forward(rows[:1], 1, Prefix())[0].float()
        beside = self._forward(rows, 1, prefix)[0].float()
        exact = self.module.dtype == torch.float32
        moved = float((alone - beside).abs().max())
        return moved <= (1e-3 if exact else 0.1) * float(alone.std())


class _Decisions:
    """A stopping criterion: ends a row as soon as its text decides the verdict."""

    def __init__(
        self, model: LanguageModel, watch: AnswerWatch | None, batch: Sequence[int]
    ) -> None:
        self.watch, self._batch = watch, batch
        self.decided_after: dict[int, int] = {}
        """Row and number of new tokens after which it was decided."""
        self._model = model
        self._start = -1
        self._seen = [""] * len(batch)

    def __call__(self, input_ids: Tensor, _scores: Any, **_: Any) -> Tensor:
        if self._start < 0:
            self._start = input_ids.shape[1] - 1
        assert self.watch is not None
        new = input_ids[:, self._start :].tolist()
        for row, ids in enumerate(new):
            if row in self.decided_after:
                continue
            text = self._model.chat.decode(_until_end(ids, self._model.end_tokens))
            added, self._seen[row] = text[len(self._seen[row]) :], text
            if self.watch.read(self._batch[row], added) or self.watch.enough():
                self.decided_after[row] = len(ids)
        done = [row in self.decided_after for row in range(len(new))]
        return torch.tensor(done, device=input_ids.device)


def _until_end(ids: Sequence[int], end_tokens: Sequence[int]) -> Row:
    """Tokens up to and with the first end token; what `generate` pads behind it is dropped."""
    for position, token in enumerate(ids):
        if token in end_tokens:
            return list(ids[: position + 1])
    return list(ids)


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


def _plain_generation(end_tokens: Sequence[int], pad: int) -> Any:
    """Greedy, and free of a checkpoint's penalties, suppressed tokens and sampling."""
    from transformers import GenerationConfig

    ends = list(end_tokens) or None
    return GenerationConfig(do_sample=False, eos_token_id=ends, pad_token_id=pad)
