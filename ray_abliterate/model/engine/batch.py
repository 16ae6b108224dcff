"""A batch of rows, and the tokens of it that a pass feeds: prompts, drafts, for several edits.

A pass of several edits holds a *copy* of the batch for each; row r of copy c stands at place
`c * rows + r` of the slab. Behind all copies' rows each has a spare one, for the beginning that its
rows share. Knows nothing about models or texts.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ray_abliterate.model.engine.draft_schedule import DraftPlan
from ray_abliterate.model.engine.generation_state import Written
from ray_abliterate.model.engine.kv_cache import Slab
from ray_abliterate.model.engine.packed_attention import Pass, Shared

Row = Sequence[int]


@dataclass
class Batch:
    """Rows that are computed together, and what the base model computed for them.

    Attributes:
        rows: Token ids, at least one each.
        prefix: How many tokens all begin with that are computed once.
        states: Inputs of some blocks by pass, `"token hidden"`.
        keys: Keys by layer, `"token (head channel)"`: the shared beginning's, then each row's own,
            prompt and draft.
        values: Values likewise.
        drafts: Answers, to be checked as drafts.
        answers: Answers as they were given.
    """

    rows: list[Row]
    prefix: int = 0
    states: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)
    drafts: list[list[int]] | None = None
    answers: list[Written] | None = None

    @property
    def bytes(self) -> int:
        """Memory of what is known."""
        kept = [t for layers in self.states.values() for t in layers.values()]
        kept += [*self.keys.values(), *self.values.values()]
        return sum(t.numel() * t.element_size() for t in kept)

    def start(self, name: str, untouched: int) -> int:
        """The block that a pass can start at when so many, from the first, are untouched."""
        layers = self.states.get(name, {})
        return max((layer for layer in layers if layer <= untouched), default=0)

    def keep_keys(self, slab: Slab, layers: int) -> None:
        """Keep keys and values of what was fed, of so many layers from the first."""
        spare = len(self.rows) * slab.positions
        places = [*range(spare, spare + self.prefix)]
        for row, length in enumerate(self._lengths):
            first = row * slab.positions
            places += range(first + self.prefix, first + length)
        fed = on_device(places, slab.keys[0].device)
        for layer in range(layers):
            self.keys[layer] = slab.keys[layer].flatten(0, 1).index_select(0, fed)
            self.values[layer] = slab.values[layer].flatten(0, 1).index_select(0, fed)

    def lend_keys(self, slab: Slab, layers: int, copies: int) -> None:
        """Give them to each copy's rows of a slab."""
        if not (layers and self.keys):
            return
        places: list[int] = []
        kept: list[int] = []
        own = self.prefix
        for row, length in enumerate(self._lengths):
            places += range(row * slab.positions, row * slab.positions + length)
            kept += [*range(self.prefix), *range(own, own + length - self.prefix)]
            own += length - self.prefix
        device, stride = self.keys[0].device, len(self.rows) * slab.positions
        into, what = on_device(places, device), on_device(kept, device)
        for layer in range(layers):
            known = self.keys[layer], self.values[layer]
            for store, base in zip(slab.layer(layer, *known), known, strict=True):
                given, flat = base.index_select(0, what), store.flatten(0, 1)
                for copy in range(copies):
                    flat.index_copy_(0, into + copy * stride, given)

    @property
    def _lengths(self) -> list[int]:
        """Tokens of each row that were fed: its prompt, and its draft but for the last."""
        drafts = self.drafts or [[] for _ in self.rows]
        return [len(r) + max(len(d) - 1, 0) for r, d in zip(self.rows, drafts, strict=True)]


@dataclass
class Tokens:
    """The tokens of a pass while they are collected.

    Attributes:
        count: Rows of a copy.
        prefix: How many tokens each copy's rows take from its spare row.
        ids: Token ids.
        places: Row of the slab that each belongs to.
        positions: Position in its row.
        wanted: Indices of the tokens whose logits are wanted.
        chosen: Which tokens of the base model's pass these are.
    """

    count: int
    prefix: int = 0
    ids: list[int] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    wanted: list[int] = field(default_factory=list)
    chosen: list[int] = field(default_factory=list)

    def add(self, place: int, first: int, ids: Sequence[int], wanted: int, chosen: int) -> None:
        """Tokens of one row from a position on; logits of the last `wanted` are wanted."""
        self.ids += ids
        self.places += [place] * len(ids)
        self.positions += range(first, first + len(ids))
        self.wanted += range(len(self.ids) - wanted, len(self.ids))
        self.chosen += range(chosen, chosen + len(ids))

    def given(
        self,
        device: torch.device,
        edits: Sequence[int],
        start: int = 0,
        states: Tensor | None = None,
    ) -> Pass:
        """As a pass of these edits' copies that begins at a block, with that block's inputs."""
        ids, places, positions, wanted = (
            on_device(values, device)
            for values in (self.ids, self.places, self.positions, self.wanted)
        )
        reach, queries = 1 + max(self.positions), max(Counter(self.places).values())
        shared = None
        if self.prefix:
            rows = torch.arange(len(edits) * self.count, device=device)
            shared = Shared(self.prefix, len(rows) + rows // self.count, rows)
        own = edit_of(self.places, self.count, edits, device)
        return Pass(ids, places, positions, wanted, reach, queries, start, states, shared, own)


def prompt_tokens(
    batch: Batch, plan: DraftPlan, known: DraftPlan, wanted: Sequence[int], copies: int
) -> Tokens:
    """Prompts, and the draft tokens that go with them.

    Args:
        batch: The prompts.
        plan: Drafts of this pass.
        known: Drafts that the base model's pass fed.
        wanted: How many logits are wanted of each row: its last ones.
        copies: Of the batch.
    """
    count, prefix = len(batch.rows), batch.prefix
    tokens = Tokens(count, prefix)
    for copy in range(copies):
        spare, base = copies * count + copy, prefix
        tokens.add(spare, 0, batch.rows[0][:prefix], 0, 0)
        for row, ids in enumerate(batch.rows):
            new = [*ids[prefix:], *plan.fed(row, 0)]
            tokens.add(copy * count + row, prefix, new, wanted[row], base)
            base += len(ids) - prefix + len(known.fed(row, 0))
    return tokens


def draft_tokens(batch: Batch, number: int, plan: DraftPlan, going: Sequence[int]) -> Tokens:
    """The draft tokens of pass `number`, of the rows at these places."""
    tokens, offsets = Tokens(len(batch.rows)), plan.offsets(number)
    for place in going:
        row = place % len(batch.rows)
        fed = plan.fed(row, number)
        first = len(batch.rows[row]) + plan.begin(number)
        tokens.add(place, first, fed, len(fed), offsets[row])
    return tokens


def edit_of(
    places: Sequence[int], count: int, edits: Sequence[int], device: torch.device
) -> Tensor:
    """The edit of each token by its place, of copies of `count` rows."""
    last = count * len(edits)
    found = [edits[p // count] if p < last else edits[p - last] for p in places]
    return on_device(found, device)


def on_device(values: Sequence[int], device: torch.device) -> Tensor:
    """Numbers on a device; nobody waits for the copy."""
    made = torch.tensor(values, dtype=torch.long)
    if device.type == "cuda":
        made = made.pin_memory()
    return made.to(device, non_blocking=True)
