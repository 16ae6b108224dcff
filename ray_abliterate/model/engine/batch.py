"""A batch of rows, and the tokens of it that a pass feeds: prompts, drafts, for several edits.

A pass of several edits holds a *copy* of the batch for each; row r of copy c is row `c * rows + r`
of the KV cache, which is called its place. Behind all copies' rows each copy has a spare row, for
the beginning that its rows share. Knows nothing about models or texts.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ray_abliterate.model.engine.draft_schedule import DraftSchedule
from ray_abliterate.model.engine.generation_state import GeneratedTokens
from ray_abliterate.model.engine.kv_cache import KVCache
from ray_abliterate.model.engine.packed_attention import PackedPass, SharedPrefix

BatchRow = Sequence[int]
"""Token ids of one prompt."""


@dataclass
class Batch:
    """Rows that are computed together, and what the base model computed for them.

    Attributes:
        rows: Token ids, at least one each.
        prefix: The number of tokens that all rows begin with and that are computed once.
        states: Inputs of some blocks by pass, then by block, `"token hidden"`.
        keys: Keys by layer, `"token (head channel)"`: the shared prefix's, then each row's own,
            prompt and draft.
        values: Values likewise.
        drafts: The base model's answers, to be verified as drafts.
        answers: The base model's answers as they were returned.
    """

    rows: list[BatchRow]
    prefix: int = 0
    states: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)
    drafts: list[list[int]] | None = None
    answers: list[GeneratedTokens] | None = None

    def first_block(self, name: str, untouched: int) -> int:
        """Return the highest block that pass `name` can start at.

        Args:
            name: The pass.
            untouched: Blocks, from the first, that are the base model's now.
        """
        layers = self.states.get(name, {})
        return max((layer for layer in layers if layer <= untouched), default=0)

    def store_kv(self, kv_cache: KVCache, layers: int) -> None:
        """Store the keys and values of all tokens that were fed, without padding.

        Args:
            kv_cache: Holds them for one copy of the batch.
            layers: Layers to store, from the first.
        """
        spare = len(self.rows) * kv_cache.positions  # where the shared prefix lies
        places = [*range(spare, spare + self.prefix)]
        for row, length in enumerate(self._fed_lengths):
            first = row * kv_cache.positions
            places += range(first + self.prefix, first + length)
        fed = to_device(places, kv_cache.keys[0].device)
        for layer in range(layers):
            # (row, position, head * channel) -> (token, head * channel)
            self.keys[layer] = kv_cache.keys[layer].flatten(0, 1).index_select(0, fed)
            self.values[layer] = kv_cache.values[layer].flatten(0, 1).index_select(0, fed)

    def fill_kv_cache(self, kv_cache: KVCache, layers: int, copies: int) -> None:
        """Write the stored keys and values into the rows of every copy.

        Args:
            kv_cache: Where they go.
            layers: Layers to fill, from the first.
            copies: Copies of the batch in the cache.
        """
        if not (layers and self.keys):
            return
        places: list[int] = []  # in the flat cache
        stored: list[int] = []  # in the stored tensors
        first_own = self.prefix  # of the stored tokens, the first that is the row's alone
        for row, length in enumerate(self._fed_lengths):
            places += range(row * kv_cache.positions, row * kv_cache.positions + length)
            stored += [*range(self.prefix), *range(first_own, first_own + length - self.prefix)]
            first_own += length - self.prefix
        device, copy_stride = self.keys[0].device, len(self.rows) * kv_cache.positions
        to, source = to_device(places, device), to_device(stored, device)
        for layer in range(layers):
            known = self.keys[layer], self.values[layer]
            for side, base in zip(kv_cache.layer(layer, *known), known, strict=True):
                tokens, flat = base.index_select(0, source), side.flatten(0, 1)
                for copy in range(copies):
                    flat.index_copy_(0, to + copy * copy_stride, tokens)

    @property
    def _fed_lengths(self) -> list[int]:
        """Tokens of each row that were fed: its prompt, and all of its draft but the last token."""
        drafts = self.drafts or [[] for _ in self.rows]
        return [len(r) + max(len(d) - 1, 0) for r, d in zip(self.rows, drafts, strict=True)]


@dataclass
class PassTokens:
    """The tokens of a pass while they are collected.

    Attributes:
        count: Rows of one copy.
        prefix: The number of tokens that each copy's rows take from its spare row.
        ids: Token ids.
        places: The row of the KV cache that each token belongs to.
        positions: The token's position in its row.
        logits_at: Indices of the tokens whose logits are wanted.
        base_tokens: Which tokens of the base model's pass these are.
    """

    count: int
    prefix: int = 0
    ids: list[int] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    logits_at: list[int] = field(default_factory=list)
    base_tokens: list[int] = field(default_factory=list)

    def add(self, place: int, first: int, ids: Sequence[int], logits: int, base_token: int) -> None:
        """Add consecutive tokens of one row.

        Args:
            place: The row of the KV cache.
            first: The position of the first token.
            ids: The tokens.
            logits: How many logits are wanted: those of the last tokens.
            base_token: Which token of the base model's pass the first one is.
        """
        self.ids += ids
        self.places += [place] * len(ids)
        self.positions += range(first, first + len(ids))
        self.logits_at += range(len(self.ids) - logits, len(self.ids))
        self.base_tokens += range(base_token, base_token + len(ids))

    def as_pass(
        self,
        device: torch.device,
        edits: Sequence[int],
        start: int = 0,
        states: Tensor | None = None,
    ) -> PackedPass:
        """Return the pass that feeds these tokens.

        Args:
            device: The model's.
            edits: The edit of each copy.
            start: The block that the pass starts at.
            states: That block's input, `"token hidden"`, if it is not the first.
        """
        ids, places, positions, logits_at = (
            to_device(values, device)
            for values in (self.ids, self.places, self.positions, self.logits_at)
        )
        key_length, max_queries = 1 + max(self.positions), max(Counter(self.places).values())
        shared = None
        if self.prefix:
            rows = torch.arange(len(edits) * self.count, device=device)
            # the spare rows lie behind all copies' rows, one a copy
            shared = SharedPrefix(self.prefix, len(rows) + rows // self.count, rows)
        edit_of_token = edits_of_tokens(self.places, self.count, edits, device)
        return PackedPass(
            ids,
            places,
            positions,
            logits_at,
            key_length,
            max_queries,
            start,
            states,
            shared,
            edit_of_token,
        )


def prompt_tokens(
    batch: Batch,
    schedule: DraftSchedule,
    base_schedule: DraftSchedule,
    logits: Sequence[int],
    copies: int,
) -> PassTokens:
    """Return the prompts of all copies, and the draft tokens that go with them.

    Args:
        batch: The prompts.
        schedule: Drafts that this pass feeds.
        base_schedule: Drafts that the base model's pass fed.
        logits: How many logits are wanted of each row: those of its last tokens.
        copies: Copies of the batch.
    """
    count, prefix = len(batch.rows), batch.prefix
    tokens = PassTokens(count, prefix)
    for copy in range(copies):
        spare, base_token = copies * count + copy, prefix
        tokens.add(spare, 0, batch.rows[0][:prefix], 0, 0)
        for row, ids in enumerate(batch.rows):
            new = [*ids[prefix:], *schedule.fed(row, 0)]
            tokens.add(copy * count + row, prefix, new, logits[row], base_token)
            base_token += len(ids) - prefix + len(base_schedule.fed(row, 0))
    return tokens


def draft_tokens(
    batch: Batch, number: int, schedule: DraftSchedule, places: Sequence[int]
) -> PassTokens:
    """Return the draft tokens that pass `number` feeds of the rows at these places."""
    tokens, offsets = PassTokens(len(batch.rows)), schedule.offsets(number)
    for place in places:
        row = place % len(batch.rows)
        fed = schedule.fed(row, number)
        first = len(batch.rows[row]) + schedule.first_fed(number)
        tokens.add(place, first, fed, len(fed), offsets[row])
    return tokens


def edits_of_tokens(
    places: Sequence[int], count: int, edits: Sequence[int], device: torch.device
) -> Tensor:
    """Return the edit of each token, `"token"`.

    Args:
        places: The row of the KV cache that each token belongs to.
        count: Rows of one copy.
        edits: The edit of each copy.
        device: Where the tensor goes.
    """
    spare = count * len(edits)  # the first spare row
    numbers = [edits[place // count] if place < spare else edits[place - spare] for place in places]
    return to_device(numbers, device)


def to_device(values: Sequence[int], device: torch.device) -> Tensor:
    """Return integers as a tensor on a device; nobody waits for the copy."""
    tensor = torch.tensor(values, dtype=torch.long)
    if device.type == "cuda":
        tensor = tensor.pin_memory()  # a copy from pageable memory would wait
    return tensor.to(device, non_blocking=True)
