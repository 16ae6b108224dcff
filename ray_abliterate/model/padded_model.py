"""The plain path: padded batches through transformers' own forward and `generate`.

What models run on whose attention or state the packed passes can't serve (recurrent and hybrid
families), and what tests hold the engine against. Knows nothing about edits or scores.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ray_abliterate.ablation.layer_hooks import device_of
from ray_abliterate.model import prefix_cache as shared_prefix
from ray_abliterate.model.chat_format import ChatFormat
from ray_abliterate.model.component_outputs import Places, outputs_of, stacked
from ray_abliterate.model.prefix_cache import Prefix
from ray_abliterate.search.score import Answer, AnswerListener, AnswerWatch

Row = Sequence[int]


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: `temperature` is above 0; the likeliest have `top_p` together."""

    temperature: float
    top_p: float
    seed: int

    def options(self) -> dict[str, Any]:
        """As `generate` takes them; no other filter of a checkpoint's is applied."""
        return {
            "do_sample": True,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": 0,
        }

    @contextmanager
    def seeded(self, device: torch.device) -> Iterator[None]:
        """Draws in this block come from the seed; the process's own generators stay as they are."""
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(self.seed)
            yield


class PaddedModel:
    """A causal language model that is asked in padded batches.

    Attributes:
        pads_safely: Padding doesn't change what the model says (measured).
        shares_prefix: A beginning that rows have in common may be computed once (measured).
    """

    def __init__(
        self, module: Any, blocks: Sequence[nn.Module], end_tokens: Sequence[int], pad: int
    ) -> None:
        self._module, self._blocks, self._ends, self._pad = module, list(blocks), end_tokens, pad
        self._takes = set(inspect.signature(module.forward).parameters)
        module.generation_config = _plain_generation(end_tokens, pad)
        self.pads_safely = self._unchanged((5, 12), share=0)
        self.shares_prefix = shared_prefix.can_share(module) and self._unchanged((12, 17), share=9)

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return device_of(self._module.get_input_embeddings())

    def shared(self, rows: Sequence[Row]) -> Prefix:
        """The beginning that all rows have in common, computed on the model as it is now."""
        length = shared_prefix.common_length(rows) if self.shares_prefix else 0
        if length < shared_prefix.WORTHWHILE_TOKENS:
            return Prefix()
        return shared_prefix.compute(self._module, rows[0][:length])

    @torch.inference_mode()
    def logits(
        self, rows: Sequence[Row], keep: int, prefix: Prefix
    ) -> Float[Tensor, "prompt token vocab"]:
        """Raw logits of the last `keep` positions."""
        inputs = self._tensors(rows, prefix)
        inputs["input_ids"] = inputs["input_ids"][:, prefix.length :]
        if "position_ids" in self._takes:
            positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp_min(0)
            inputs["position_ids"] = positions[:, prefix.length :]
        if "logits_to_keep" in self._takes:
            inputs["logits_to_keep"] = keep
        logits: Tensor = self._module(**inputs, use_cache=prefix.cache is not None).logits
        return logits[:, -keep:]

    @torch.inference_mode()
    def residuals(
        self, rows: Sequence[Row], prefix: Prefix, more: Places = ()
    ) -> Float[Tensor, "prompt layer hidden"]:
        """Every block's output at the last token, float32 on the CPU; `more` modules' outputs come
        after them."""

        def take(hidden: Tensor) -> Tensor:
            return hidden.reshape(len(rows), -1, hidden.shape[-1])[:, -1].float().cpu()

        with outputs_of([*self._blocks, *more], take) as found:
            self.logits(rows, 1, prefix)
        return stacked(found)

    @torch.inference_mode()
    def generate(
        self,
        rows: Sequence[Row],
        limit: int,
        prefix: Prefix,
        stop: "Decisions | Followed | None" = None,
        sampling: Sampling | None = None,
    ) -> list[list[int]]:
        """New tokens of each row, up to and with the end token."""
        inputs = self._tensors(rows, prefix)
        inputs |= sampling.options() if sampling else {}
        with sampling.seeded(self.device) if sampling else nullcontext():
            output = self._module.generate(
                **inputs, max_new_tokens=limit, stopping_criteria=[stop] if stop else None
            )
        new: list[list[int]] = output[:, inputs["input_ids"].shape[1] :].tolist()
        return [until_end(tokens, self._ends) for tokens in new]

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

    @torch.inference_mode()
    def _unchanged(self, lengths: tuple[int, int], share: int) -> bool:
        """Whether a prompt's logits are the same alone and beside a longer one.

        Not so where padding leaks into a recurrent state; batches are then made of prompts of one
        length. With `share`, both begin with so many tokens, computed once.
        """
        rows = probe_rows(self._module, lengths, share)
        prefix = shared_prefix.compute(self._module, rows[0][:share]) if share else Prefix()
        alone = self.logits(rows[:1], 1, Prefix())[0]
        return same_logits(alone, self.logits(rows, 1, prefix)[0])


class Decisions:
    """A stopping criterion: ends a row as soon as its text decides the verdict."""

    def __init__(
        self,
        watch: AnswerWatch,
        indices: Sequence[int],
        chat: ChatFormat,
        end_tokens: Sequence[int],
        limit: int,
    ) -> None:
        self.decided_after: dict[int, int] = {}
        """Row and number of new tokens after which it was decided."""
        self._watch, self._indices, self._ends = watch, indices, end_tokens
        self._listener = watch if isinstance(watch, AnswerListener) else None
        self._chat, self._limit = chat, limit
        self._streams = [chat.stream() for _ in indices]
        for index in indices:
            watch.begin(index)
        self._read = 0
        self._start = -1

    def __call__(self, input_ids: Tensor, _scores: Any, **_: Any) -> Tensor:
        """Which rows are done; told all tokens after each step."""
        if self._start < 0:
            self._start = input_ids.shape[1] - 1
        new = input_ids[:, self._start + self._read :].tolist()
        self._read += len(new[0])
        for row, ids in enumerate(new):
            if row in self.decided_after:
                continue
            if any(token in self._ends for token in ids) or self._read == self._limit:
                self.decided_after[row] = self._read
                self._end(row, input_ids[row, self._start :].tolist())
                continue
            text = "".join(self._streams[row].push(token) for token in ids)
            if (text and self._watch.read(self._indices[row], text)) or self._watch.enough():
                self.decided_after[row] = self._read
        done = [row in self.decided_after for row in range(len(new))]
        return torch.tensor(done, device=input_ids.device)

    def _end(self, row: int, tokens: list[int]) -> None:
        if self._listener is not None:
            tokens = until_end(tokens, self._ends)
            answer = Answer(self._chat.decode(tokens), len(tokens), False)
            self._listener.ended(self._indices[row], answer)


class Followed:
    """A stopping criterion for one row: passes each new token on, and ends when told so."""

    def __init__(self, token: Callable[[int], bool]) -> None:
        self._token = token

    def __call__(self, input_ids: Tensor, _scores: Any, **_: Any) -> Tensor:
        """Whether the row is done."""
        done = self._token(int(input_ids[0, -1]))
        return torch.tensor([done], device=input_ids.device)


def until_end(ids: Sequence[int], end_tokens: Sequence[int]) -> list[int]:
    """Tokens up to and with the first end token; what `generate` pads behind it is dropped."""
    for position, token in enumerate(ids):
        if token in end_tokens:
            return list(ids[: position + 1])
    return list(ids)


def probe_rows(module: Any, lengths: Sequence[int], share: int) -> list[list[int]]:
    """Made-up prompts of these lengths whose first `share` tokens are the same."""
    limit = module.get_input_embeddings().weight.shape[0] - 1
    return [[(7 * i + 1 + (i >= share) * n) % limit for i in range(n)] for n in lengths]


def same_logits(a: Float[Tensor, "*token vocab"], b: Float[Tensor, "*token vocab"]) -> bool:
    """Equal but for rounding: their root mean square distance is below 0.001 of their spread in
    float32, and 0.1 in half precision, where 30 layers of rounding make 0.02 to 0.05."""
    limit = 1e-3 if a.dtype == torch.float32 else 0.1
    moved = (a.float() - b.float()).square().mean().sqrt()
    return float(moved) <= limit * float(a.float().std())


def _plain_generation(end_tokens: Sequence[int], pad: int) -> Any:
    """Greedy, and free of a checkpoint's penalties, suppressed tokens and sampling."""
    from transformers import GenerationConfig

    ends = list(end_tokens) or None
    return GenerationConfig(do_sample=False, eos_token_id=ends, pad_token_id=pad)
