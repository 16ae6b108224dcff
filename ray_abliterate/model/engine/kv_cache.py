"""The keys and values of rows by layer, and a pool of memory for them. Knows no models."""

from torch import Tensor


class KVCachePool:
    """Memory that KV caches take one after the other; the newest may overwrite what others held.

    The tensors of a cache lie where those of the cache before lay, if they are no larger: a CUDA
    graph reads the addresses that it was recorded with (`model/engine/cuda_graphs.py`).

    Attributes:
        moves: How often tensors were moved to another address.
    """

    def __init__(self) -> None:
        self.moves = 0
        self._tensors: dict[tuple[int, str], Tensor] = {}  # flat, by layer and side

    def take(self, layer: int, side: str, shape: tuple[int, int, int], like: Tensor) -> Tensor:
        """Return zeros of this shape, of the dtype and on the device of another tensor.

        Args:
            layer: The layer.
            side: `keys` or `values`.
            shape: Rows, positions, and heads times channels.
            like: A tensor of the wanted dtype and device.
        """
        size, place = shape[0] * shape[1] * shape[2], (layer, side)
        tensor = self._tensors.get(place)
        if tensor is None or tensor.numel() < size or tensor.dtype != like.dtype:
            # freed before its successor is made, since there may not be room for both
            tensor = None
            self._tensors.pop(place, None)
            self._tensors[place] = tensor = like.new_empty(size)
            self.moves += 1
        return tensor[:size].view(shape).zero_()

    def release(self) -> None:
        """Free the memory; the next cache lies elsewhere."""
        self._tensors.clear()
        self.moves += 1


class KVCache:
    """Keys and values of rows, by layer: `"row position (head channel)"`.

    A token's position in the cache is its position in its row.

    Attributes:
        rows: The number of rows.
        positions: Positions that each row has room for.
        keys: Keys by layer.
        values: Values by layer.
        windows: Attention windows that layers have asked for.
    """

    def __init__(self, rows: int, positions: int, pool: KVCachePool | None = None) -> None:
        """
        Args:
            rows: The number of rows.
            positions: Positions that each row has room for.
            pool: Where the memory comes from; if None, the cache allocates its own.
        """
        self.rows, self.positions = rows, positions
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.windows: set[int] = set()
        self._pool = pool

    @property
    def bytes(self) -> int:
        """The bytes of all layers that have been used."""
        tensors = [*self.keys.values(), *self.values.values()]
        return sum(t.numel() * t.element_size() for t in tensors)

    def layer(self, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return one layer's keys and values, allocated when the layer is first asked for.

        Args:
            index: The layer.
            key: Any keys of this layer, `"token (head channel)"`, for their width and dtype.
            value: Any values likewise.
        """
        if index not in self.keys:
            self.keys[index] = self._zeros(index, "keys", key)
            self.values[index] = self._zeros(index, "values", value)
        return self.keys[index], self.values[index]

    def truncate_rows(self, count: int) -> None:
        """Drop all rows but the first `count`; nothing is copied."""
        self.rows = count
        for side in (self.keys, self.values):
            for index, tensor in side.items():
                side[index] = tensor[:count]

    def select_rows(self, rows: Tensor) -> None:
        """Drop all rows but these, `"row"`; row `rows[i]` becomes row i."""
        self.rows = len(rows)
        for side in (self.keys, self.values):
            for index, tensor in side.items():
                selected = tensor.index_select(0, rows)
                # in a pool the tensors must stay at their address
                in_pool = self._pool is not None
                side[index] = tensor[: len(rows)].copy_(selected) if in_pool else selected

    def _zeros(self, index: int, side: str, like: Tensor) -> Tensor:
        shape = self.rows, self.positions, like.shape[-1]  # (row, position, head * channel)
        if self._pool is None:
            return like.new_zeros(shape)
        return self._pool.take(index, side, shape, like)
