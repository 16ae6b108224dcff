"""The plain path: padded batches through transformers' own forward and `generate`.

It serves models whose attention or state packed passes can't (recurrent and hybrid families), and
tests compare the engine with it. Knows nothing about edits or scores.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ray_abliterate.model import prefix_cache
from ray_abliterate.model.chat_format import ChatFormat
from ray_abliterate.model.component_outputs import ComponentModules, capture_outputs, stack_outputs
from ray_abliterate.model.devices import device_of
from ray_abliterate.model.prefix_cache import Prefix
from ray_abliterate.model.text_model import Answer, AnswerListener, AnswerObserver

PaddedRow = Sequence[int]
"""Token ids of one prompt."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are sampled.

    Attributes:
        temperature: Above 0.
        top_p: Only the likeliest tokens are sampled, which together have this probability.
        seed: Of the draws.
    """

    temperature: float
    top_p: float
    seed: int

    def options(self) -> dict[str, Any]:
        """Return options of `generate`; no other filter of the checkpoint's is applied."""
        return {
            "do_sample": True,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": 0,
        }

    @contextmanager
    def seeded(self, device: torch.device) -> Iterator[None]:
        """Draw from the seed inside the block; the process's own generators don't change."""
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(self.seed)
            yield


class PaddedModel:
    """A causal language model that computes padded batches.

    Attributes:
        pads_safely: Whether padding leaves the model's output unchanged (measured).
        shares_prefix: Whether a common beginning of rows may be computed once (measured).
    """

    def __init__(
        self, module: Any, blocks: Sequence[nn.Module], end_tokens: Sequence[int], pad: int
    ) -> None:
        """Measure what padding and a shared prefix do to the model's output.

        Args:
            module: The transformers model.
            blocks: Its residual blocks.
            end_tokens: Tokens that end an answer.
            pad: The token that fills rows up; it is masked.
        """
        self._module, self._blocks, self._ends, self._pad = module, list(blocks), end_tokens, pad
        self._parameters = set(inspect.signature(module.forward).parameters)
        module.generation_config = _greedy_generation(end_tokens, pad)
        self.pads_safely = self._is_unchanged((5, 12), share=0)
        self.shares_prefix = prefix_cache.can_cache_prefix(module) and self._is_unchanged(
            (12, 17), share=9
        )

    @property
    def device(self) -> torch.device:
        """The device that token ids go to."""
        return device_of(self._module.get_input_embeddings())

    def shared_prefix(self, rows: Sequence[PaddedRow]) -> Prefix:
        """Return the beginning that all rows have in common, computed on the model as it is now."""
        length = prefix_cache.common_length(rows) if self.shares_prefix else 0
        if length < prefix_cache.WORTHWHILE_TOKENS:
            return Prefix()
        return prefix_cache.compute_prefix(self._module, rows[0][:length])

    @torch.inference_mode()
    def logits(
        self, rows: Sequence[PaddedRow], last: int, prefix: Prefix
    ) -> Float[Tensor, "prompt token vocab"]:
        """Return raw logits of the last positions.

        Args:
            rows: Token ids.
            last: How many positions, counted from the end.
            prefix: What all rows begin with, from `shared_prefix`.
        """
        inputs = self._inputs(rows, prefix)
        inputs["input_ids"] = inputs["input_ids"][:, prefix.length :]
        if "position_ids" in self._parameters:
            positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp_min(0)  # (row, token)
            inputs["position_ids"] = positions[:, prefix.length :]
        if "logits_to_keep" in self._parameters:
            inputs["logits_to_keep"] = last
        logits: Tensor = self._module(**inputs, use_cache=prefix.cache is not None).logits
        return logits[:, -last:]

    @torch.inference_mode()
    def residuals(
        self, rows: Sequence[PaddedRow], prefix: Prefix, components: ComponentModules = ()
    ) -> Float[Tensor, "prompt layer hidden"]:
        """Return every block's output at the last token, float32 on the CPU.

        The outputs of `components` come after those of the blocks.
        """

        def at_last_token(hidden: Tensor) -> Tensor:
            return hidden.reshape(len(rows), -1, hidden.shape[-1])[:, -1].float().cpu()

        with capture_outputs([*self._blocks, *components], at_last_token) as outputs:
            self.logits(rows, 1, prefix)
        return stack_outputs(outputs)

    @torch.inference_mode()
    def generate(
        self,
        rows: Sequence[PaddedRow],
        limit: int,
        prefix: Prefix,
        stop: "ObserverCriterion | CallbackCriterion | None" = None,
        sampling: Sampling | None = None,
    ) -> list[list[int]]:
        """Return new tokens of each row, up to and with the end token.

        Args:
            rows: Token ids.
            limit: The most new tokens of a row.
            prefix: What all rows begin with, from `shared_prefix`.
            stop: May end rows early.
            sampling: How tokens are sampled; greedily chosen if None.
        """
        inputs = self._inputs(rows, prefix)
        inputs |= sampling.options() if sampling else {}
        with sampling.seeded(self.device) if sampling else nullcontext():
            output = self._module.generate(
                **inputs, max_new_tokens=limit, stopping_criteria=[stop] if stop else None
            )
        new: list[list[int]] = output[:, inputs["input_ids"].shape[1] :].tolist()
        return [until_end(tokens, self._ends) for tokens in new]

    def _inputs(self, rows: Sequence[PaddedRow], prefix: Prefix) -> dict[str, Any]:
        """Return ids, mask and cache.

        Padding goes between the prefix and the rest, so that every row's last token is at -1.
        """
        width, start = max(len(row) for row in rows), prefix.length
        pairs = [(row, width - len(row)) for row in rows]  # a row, and its padding
        ids = [[*row[:start], *[self._pad] * gap, *row[start:]] for row, gap in pairs]
        mask = [[1] * start + [0] * gap + [1] * (len(row) - start) for row, gap in pairs]
        inputs: dict[str, Any] = {  # (row, token)
            "input_ids": torch.tensor(ids, device=self.device),
            "attention_mask": torch.tensor(mask, device=self.device),
        }
        if prefix.cache is not None:
            inputs["past_key_values"] = prefix.for_rows(len(rows))
        return inputs

    @torch.inference_mode()
    def _is_unchanged(self, lengths: tuple[int, int], share: int) -> bool:
        """Return whether a prompt's logits are the same alone and in a batch with a longer one.

        They are not where padding leaks into a recurrent state; batches are then made of prompts of
        one length.

        Args:
            lengths: Tokens of the two prompts.
            share: Tokens that both begin with, computed once.
        """
        rows = probe_rows(self._module, lengths, share)
        prefix = Prefix()
        if share:
            prefix = prefix_cache.compute_prefix(self._module, rows[0][:share])
        alone = self.logits(rows[:1], 1, Prefix())[0]
        return same_logits(alone, self.logits(rows, 1, prefix)[0])


class ObserverCriterion:
    """A stopping criterion of transformers that shows answers to an observer.

    It ends a row as soon as the observer has decided.

    Attributes:
        decided_after: Tokens after which a row was decided, by row.
    """

    def __init__(
        self,
        observer: AnswerObserver,
        indices: Sequence[int],
        chat: ChatFormat,
        end_tokens: Sequence[int],
        limit: int,
    ) -> None:
        """
        Args:
            observer: Reads along.
            indices: The number that the observer knows each row by.
            chat: Turns tokens into text.
            end_tokens: Tokens that end an answer.
            limit: The most tokens of an answer.
        """
        self.decided_after: dict[int, int] = {}
        self._observer, self._indices, self._ends = observer, indices, end_tokens
        self._listener = observer if isinstance(observer, AnswerListener) else None
        self._chat, self._limit = chat, limit
        self._streams = [chat.stream() for _ in indices]
        for index in indices:
            observer.begin(index)
        self._tokens_read = 0
        self._start = -1

    def __call__(self, input_ids: Tensor, _scores: Any, **_: Any) -> Tensor:
        """Return which rows are done, `"row"`, given all tokens so far, `"row token"`."""
        if self._start < 0:
            self._start = input_ids.shape[1] - 1
        new = input_ids[:, self._start + self._tokens_read :].tolist()
        self._tokens_read += len(new[0])
        for row, ids in enumerate(new):
            if row in self.decided_after:
                continue
            if any(token in self._ends for token in ids) or self._tokens_read == self._limit:
                self.decided_after[row] = self._tokens_read
                self._report_end(row, input_ids[row, self._start :].tolist())
                continue
            text = "".join(self._streams[row].push(token) for token in ids)
            decided = text and self._observer.read(self._indices[row], text)
            if decided or self._observer.enough():
                self.decided_after[row] = self._tokens_read
        done = [row in self.decided_after for row in range(len(new))]
        return torch.tensor(done, device=input_ids.device)

    def _report_end(self, row: int, tokens: list[int]) -> None:
        if self._listener is not None:
            tokens = until_end(tokens, self._ends)
            answer = Answer(self._chat.decode(tokens), len(tokens), False)
            self._listener.ended(self._indices[row], answer)


class CallbackCriterion:
    """A stopping criterion of transformers for one row, which a callback may end at any token."""

    def __init__(self, callback: Callable[[int], bool]) -> None:
        """
        Args:
            callback: Is called with each new token; returns whether the row ends there.
        """
        self._callback = callback

    def __call__(self, input_ids: Tensor, _scores: Any, **_: Any) -> Tensor:
        """Return whether the row is done, `"row"`, given all tokens so far, `"row token"`."""
        done = self._callback(int(input_ids[0, -1]))
        return torch.tensor([done], device=input_ids.device)


def until_end(ids: Sequence[int], end_tokens: Sequence[int]) -> list[int]:
    """Return tokens up to and with the first end token; `generate` pads after it."""
    for position, token in enumerate(ids):
        if token in end_tokens:
            return list(ids[: position + 1])
    return list(ids)


def probe_rows(module: Any, lengths: Sequence[int], share: int) -> list[list[int]]:
    """Return made-up prompts of these lengths whose first `share` tokens are the same."""
    limit = module.get_input_embeddings().weight.shape[0] - 1
    return [[(7 * i + 1 + (i >= share) * n) % limit for i in range(n)] for n in lengths]


def same_logits(a: Float[Tensor, "*token vocab"], b: Float[Tensor, "*token vocab"]) -> bool:
    """Return whether logits are equal but for rounding.

    Their root mean square distance is then below 0.001 of their spread in float32, and 0.1 in half
    precision, where 30 layers of rounding make 0.02 to 0.05.
    """
    limit = 1e-3 if a.dtype == torch.float32 else 0.1
    moved = (a.float() - b.float()).square().mean().sqrt()
    return float(moved) <= limit * float(a.float().std())


def _greedy_generation(end_tokens: Sequence[int], pad: int) -> Any:
    """Return a greedy configuration, without a checkpoint's penalties and suppressed tokens."""
    from transformers import GenerationConfig

    ends = list(end_tokens) or None
    return GenerationConfig(do_sample=False, eos_token_id=ends, pad_token_id=pad)
