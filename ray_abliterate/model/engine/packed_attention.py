"""Attention for rows whose tokens go through a model in one flat pass.

It writes keys and values into a KV cache (row x position) and reads each row's own, so that rows
may bring any number of tokens. transformers calls it by a registered name. Knows nothing about
models.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ray_abliterate.errors import ModelError
from ray_abliterate.model.engine.kv_cache import KVCache

ATTENTION = "ray_abliterate_packed"
"""The name that transformers calls this attention by."""


class NotPackable(ModelError):
    """The model's attention needs something that a packed pass does not give it."""


@dataclass(frozen=True)
class SharedPrefix:
    """Tokens that many rows begin with, computed once in this pass.

    Row `to[i]` takes its first `length` positions from row `source[i]`.

    Attributes:
        length: Positions to copy.
        source: Rows of the KV cache, `"copy"`.
        to: Rows of the KV cache, `"copy"`.
    """

    length: int
    source: Tensor
    to: Tensor


@dataclass(frozen=True)
class PackedPass:
    """Tokens for one pass; all tensors are `"token"`, on the model's device.

    `key_length` and `max_queries` are known where a pass is made; reading them off a device would
    wait for it.

    Attributes:
        ids: Token ids.
        rows: The row of the KV cache that each token belongs to.
        positions: The token's position in its row, from 0.
        logits_at: Indices of the tokens whose logits are wanted.
        key_length: 1 + the largest position.
        max_queries: Tokens of the row that brings most.
        start: The first block that is run.
        states: Input of that block, `"token hidden"`, if it is not the first.
        shared: Beginnings to copy from row to row.
        edits: The number of the edit that each token is computed with, if several share the pass.
    """

    ids: Tensor
    rows: Tensor
    positions: Tensor
    logits_at: Tensor
    key_length: int
    max_queries: int
    start: int = 0
    states: Tensor | None = None
    shared: SharedPrefix | None = None
    edits: Tensor | None = None


@dataclass(frozen=True)
class AttentionOptions:
    """What one layer's attention is like.

    Attributes:
        scaling: Factor of the scores.
        window: A token sees itself and the `window - 1` positions before it; 0 for all of them.
        softcap: Scores are bounded by a tanh of this height (Gemma 2).
        sinks: One more score for each head, of a place that holds nothing (gpt-oss), `"head"`.
    """

    scaling: float
    window: int = 0
    softcap: float | None = None
    sinks: Tensor | None = None


@dataclass
class _PassAttention:
    """What attention needs in one pass; the same in every layer.

    Queries are padded: each row has room for `max_queries` of them.

    Attributes:
        kv_cache: Keys and values; those of the pass are added.
        cache_index: Flat index of each token in the KV cache, `"token"`.
        query_index: Flat index of each token among the padded queries, `"token"`.
        max_queries: Tokens of the row that brings most.
        key_length: Positions that any token may look at.
        visible: `"row query position"`: what each query may look at.
        shared: Beginnings to copy from row to row.
        query_positions: `"row query 1"`: the position of each query.
        masks: Additive masks by group size, window and dtype, made when they are first needed.
    """

    kv_cache: KVCache
    cache_index: Tensor
    query_index: Tensor
    max_queries: int
    key_length: int
    visible: Tensor
    shared: SharedPrefix | None
    query_positions: Tensor
    masks: dict[tuple[int, int, torch.dtype], Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, packed: PackedPass, kv_cache: KVCache) -> "_PassAttention":
        rows, positions, queries = packed.rows, packed.positions, packed.max_queries
        query_index = rows
        if queries > 1:
            # number the tokens of each row: their rank among those of the same row
            count = torch.bincount(rows, minlength=kv_cache.rows)  # (row,)
            order = torch.argsort(rows, stable=True)
            begin = torch.cumsum(count, 0) - count
            rank = torch.empty_like(rows)
            rank[order] = torch.arange(len(rows), device=rows.device) - begin[rows[order]]
            query_index = rows * queries + rank
        query_positions = torch.zeros(kv_cache.rows * queries, dtype=torch.long, device=rows.device)
        query_positions[query_index] = positions
        query_positions = query_positions.view(kv_cache.rows, queries, 1)
        visible = torch.arange(packed.key_length, device=rows.device) <= query_positions
        return cls(
            kv_cache,
            rows * kv_cache.positions + positions,
            query_index,
            queries,
            packed.key_length,
            visible,
            packed.shared,
            query_positions,
        )

    def mask(self, group: int, window: int, dtype: torch.dtype) -> Tensor:
        """Return the additive mask, `"row 1 (group query) position"`.

        Args:
            group: Query heads that share a key head.
            window: See `AttentionOptions`.
            dtype: The queries'.
        """
        key = group, window, dtype
        if key not in self.masks:
            visible = self.visible
            if window:
                positions = torch.arange(self.key_length, device=visible.device)
                visible = visible & (positions > self.query_positions - window)
            mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
            mask.masked_fill_(~visible, float("-inf"))
            self.masks[key] = mask.repeat(1, group, 1)[:, None]
        return self.masks[key]

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
    ) -> Tensor:
        """Return the attention of one layer, `"1 token head channel"`.

        Args:
            layer: Its index.
            query: `"1 head token channel"`.
            key: `"1 key_head token channel"`.
            value: `"1 key_head token value_channel"`.
            options: What the layer's attention is like.
        """
        _, heads, _, channels = query.shape
        key_heads, value_channels = key.shape[1], value.shape[-1]
        group, rows = heads // key_heads, self.kv_cache.rows
        keys, values = self._write(layer, key[0], value[0])  # (row, position, head * channel)

        tokens = query[0].transpose(0, 1)  # (token, head, channel)
        padded = tokens.new_zeros(rows * self.max_queries, heads, channels)
        padded.index_copy_(0, self.query_index, tokens)
        padded = padded.view(rows, self.max_queries, heads, channels)
        # query heads of one key head side by side: (row, key_head, group * query, channel)
        grouped = padded.transpose(1, 2).reshape(
            rows, key_heads, group * self.max_queries, channels
        )
        length = self.key_length
        seen = (  # (row, key_head, position, channel)
            keys[:, :length].view(rows, length, key_heads, channels).transpose(1, 2),
            values[:, :length].view(rows, length, key_heads, value_channels).transpose(1, 2),
        )
        mask = self.mask(group, options.window, query.dtype)
        if options.softcap is None and options.sinks is None:
            out = nn.functional.scaled_dot_product_attention(
                grouped, *seen, attn_mask=mask, scale=options.scaling
            )
        else:
            out = _unfused_attention(grouped, *seen, mask, options, self.max_queries)
        out = out.reshape(rows, heads, self.max_queries, value_channels).transpose(1, 2)
        flat = out.reshape(rows * self.max_queries, heads, value_channels)
        return flat.index_select(0, self.query_index)[None]  # without padding again

    def _write(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values, `"head token channel"`, to the cache; return all of the layer's."""
        tokens = key.shape[1]
        flat_key, flat_value = (t.transpose(0, 1).reshape(tokens, -1) for t in (key, value))
        keys, values = self.kv_cache.layer(layer, flat_key, flat_value)
        for side, new in ((keys, flat_key), (values, flat_value)):
            side.view(-1, side.shape[-1]).index_copy_(0, self.cache_index, new)
            if self.shared is not None:
                beginning = side[self.shared.source, : self.shared.length]
                side[self.shared.to, : self.shared.length] = beginning
        return keys, values


def _unfused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    options: AttentionOptions,
    max_queries: int,
) -> Tensor:
    """Return attention with a soft cap or sinks, which the fused kernels lack.

    Args:
        query: `"row key_head (group query) channel"`.
        key: `"row key_head position channel"`.
        value: `"row key_head position value_channel"`.
        mask: `"row 1 (group query) position"`.
        options: What the layer's attention is like.
        max_queries: Queries of each row.
    """
    scores = query @ key.transpose(-1, -2) * options.scaling
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    scores = scores + mask
    if options.sinks is not None:
        # one more column, whose weight goes nowhere: (row, key_head, group * query, 1)
        each_query = options.sinks.repeat_interleave(max_queries)
        column = each_query.to(scores.dtype).view(1, scores.shape[1], -1, 1)
        scores = torch.cat([scores, column.expand(len(scores), -1, -1, -1)], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return weights[..., : key.shape[-2]] @ value


_current: _PassAttention | None = None
"""That of the pass that runs now: transformers passes nothing of ours to attention functions."""


@contextmanager
def packed_attention_of(packed: PackedPass, kv_cache: KVCache) -> Iterator[None]:
    """Let `packed_attention` be that of this pass inside the block."""
    global _current
    _current = _PassAttention.of(packed, kv_cache)
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
    """Compute attention as transformers calls it; the parameters are those of its interface.

    Raises:
        NotPackable: the model asks for more than a packed pass gives.
    """
    if _current is None:
        raise NotPackable("packed attention was called outside a packed pass")
    if options.get("position_bias") is not None or attention_mask is not None:
        raise NotPackable("its attention has a bias or a mask of its own")
    layer: Any = module.layer_idx
    window = options.get("sliding_window") or 0
    _current.kv_cache.windows |= {window} - {0}
    layer_options = AttentionOptions(
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        window,
        options.get("softcap"),
        options.get("s_aux"),
    )
    return _current.attend(layer, query, key, value, layer_options), None
