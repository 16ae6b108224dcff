"""Attention of rows whose tokens go through a model in one flat pass.

It writes keys and values into a slab (row x position) and reads each row's own, so that rows may
bring any number of tokens. transformers knows it under a name. Knows nothing about models.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ray_abliterate.errors import ModelError
from ray_abliterate.model.engine.kv_cache import Slab

ATTENTION = "ray_abliterate_packed"
"""Name under which transformers knows our attention."""


class NotPackable(ModelError):
    """The model's attention needs something that the packed pass does not give it."""


@dataclass(frozen=True)
class Shared:
    """Beginnings that rows take from others: row `to[i]` has the first `length` positions of
    row `source[i]`, which are computed in this pass."""

    length: int
    source: Tensor
    to: Tensor


@dataclass(frozen=True)
class Pass:
    """Tokens for one pass, all tensors `"token"` on the model's device.

    Attributes:
        ids: Token ids.
        rows: Row of the slab that each belongs to.
        positions: Position in its row, from 0.
        wanted: Indices of the tokens whose logits are wanted.
        start: First block that is run.
        states: Input of that block, `"token hidden"`, if it is not the first.
        shared: Beginnings to copy from row to row.
        edits: Number of the edit that each token is computed with, if several share the pass.
        reach: 1 + the largest position.
        queries: Tokens of the row that brings most.

    `reach` and `queries` are known where a pass is made; reading them off a device would wait
    for it.
    """

    ids: Tensor
    rows: Tensor
    positions: Tensor
    wanted: Tensor
    reach: int
    queries: int
    start: int = 0
    states: Tensor | None = None
    shared: Shared | None = None
    edits: Tensor | None = None


@dataclass
class _Attention:
    """What attention needs in one pass; the same in every layer."""

    slab: Slab
    write: Tensor
    """Flat place of each token in the slab."""
    place: Tensor
    """Flat place of each token among the padded queries."""
    queries: int
    """Tokens of the row that brings most."""
    reach: int
    """Positions that any token may look at."""
    visible: Tensor
    """`"row query position"`: what each query may look at."""
    shared: Shared | None
    at: Tensor
    """`"row query 1"`: the position of each query."""
    masks: dict[tuple[int, int, torch.dtype], Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, given: Pass, slab: Slab) -> "_Attention":
        rows, positions, queries = given.rows, given.positions, given.queries
        place = rows
        if queries > 1:
            count = torch.bincount(rows, minlength=slab.rows)
            order = torch.argsort(rows, stable=True)
            begin = torch.cumsum(count, 0) - count
            rank = torch.empty_like(rows)
            rank[order] = torch.arange(len(rows), device=rows.device) - begin[rows[order]]
            place = rows * queries + rank
        at = torch.zeros(slab.rows * queries, dtype=torch.long, device=rows.device)
        at[place] = positions
        visible = torch.arange(given.reach, device=rows.device) <= at.view(slab.rows, queries, 1)
        return cls(
            slab,
            rows * slab.positions + positions,
            place,
            queries,
            given.reach,
            visible,
            given.shared,
            at.view(slab.rows, queries, 1),
        )

    def mask(self, group: int, window: int, dtype: torch.dtype) -> Tensor:
        """Additive mask for query heads that share a key head, `"row 1 (group query) position"`.

        With a window, a token sees itself and the `window - 1` positions before it.
        """
        key = group, window, dtype
        if key not in self.masks:
            seen = self.visible
            if window:
                places = torch.arange(self.reach, device=seen.device)
                seen = seen & (places > self.at - window)
            hidden = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
            hidden.masked_fill_(~seen, float("-inf"))
            self.masks[key] = hidden.repeat(1, group, 1)[:, None]
        return self.masks[key]

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        window: int = 0,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Attention of one layer; query, key and value `"1 head token channel"`.

        With `softcap` scores are bounded by a tanh (Gemma 2), with `sinks` every head has one
        more place to look at, which holds nothing (gpt-oss).
        """
        _, heads, tokens, width = query.shape
        shared_heads, out_width = key.shape[1], value.shape[-1]
        group, rows = heads // shared_heads, self.slab.rows
        flat_key, flat_value = (t[0].transpose(0, 1).reshape(tokens, -1) for t in (key, value))
        keys, values = self.slab.layer(layer, flat_key, flat_value)
        for store, new in ((keys, flat_key), (values, flat_value)):
            store.view(-1, store.shape[-1]).index_copy_(0, self.write, new)
            if self.shared is not None:
                beginning = store[self.shared.source, : self.shared.length]
                store[self.shared.to, : self.shared.length] = beginning
        given = query[0].transpose(0, 1)
        padded = given.new_zeros(rows * self.queries, heads, width)
        padded.index_copy_(0, self.place, given)
        padded = padded.view(rows, self.queries, heads, width)
        grouped = padded.transpose(1, 2).reshape(rows, shared_heads, group * self.queries, width)
        seen = (
            keys[:, : self.reach].view(rows, self.reach, shared_heads, width).transpose(1, 2),
            values[:, : self.reach].view(rows, self.reach, shared_heads, out_width).transpose(1, 2),
        )
        mask = self.mask(group, window, query.dtype)
        if softcap is None and sinks is None:
            out = nn.functional.scaled_dot_product_attention(
                grouped, *seen, attn_mask=mask, scale=scaling
            )
        else:
            each = None if sinks is None else sinks.repeat_interleave(self.queries)
            out = _attend_by_hand(grouped, *seen, mask, scaling, softcap, each)
        out = out.reshape(rows, heads, self.queries, out_width).transpose(1, 2)
        flat = out.reshape(rows * self.queries, heads, out_width)
        return flat.index_select(0, self.place)[None]


def _attend_by_hand(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention with what the fused kernels lack; `sinks` has one score per head and query."""
    scores = query @ key.transpose(-1, -2) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + mask
    if sinks is not None:
        column = sinks.to(scores.dtype).view(1, scores.shape[1], -1, 1)
        scores = torch.cat([scores, column.expand(len(scores), -1, -1, -1)], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return weights[..., : key.shape[-2]] @ value


_current: _Attention | None = None
"""Of the pass that runs now; attention functions get no other word from us."""


@contextmanager
def attending(given: Pass, slab: Slab) -> Iterator[None]:
    """Attention is that of this pass in this block."""
    global _current
    _current = _Attention.of(given, slab)
    try:
        yield
    finally:
        _current = None


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it.

    Raises:
        NotPackable: the model asks for more than a packed pass gives.
    """
    if _current is None:
        raise NotPackable("packed attention was called outside a packed pass")
    if options.get("position_bias") is not None or attention_mask is not None:
        raise NotPackable("its attention has a bias or a mask of its own")
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer: Any = module.layer_idx
    window = options.get("sliding_window") or 0
    _current.slab.windows |= {window} - {0}
    softcap, sinks = options.get("softcap"), options.get("s_aux")
    return _current.attend(layer, query, key, value, factor, window, softcap, sinks), None
