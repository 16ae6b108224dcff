"""Keys and values of rows by layer, and memory for them that stays where it is. Knows no models."""

from torch import Tensor


class Arena:
    """Memory that slabs take one after the other; the newest may overwrite what others held.

    Their tensors then lie where those of the slab before lay, if they are no larger, which steps
    that are recorded need (`model/engine/cuda_graphs.py`).
    """

    def __init__(self) -> None:
        self._held: dict[tuple[int, str], Tensor] = {}
        self.moves = 0
        """Times that tensors were put elsewhere."""

    def take(self, layer: int, side: str, shape: tuple[int, int, int], like: Tensor) -> Tensor:
        """Zeros of this shape, of the dtype and on the device of another tensor."""
        size, place = shape[0] * shape[1] * shape[2], (layer, side)
        held = self._held.get(place)
        if held is None or held.numel() < size or held.dtype != like.dtype:
            held = None
            self._held.pop(
                place, None
            )  # before its successor is made: there may not be room for both
            self._held[place] = held = like.new_empty(size)
            self.moves += 1
        return held[:size].view(shape).zero_()

    def clear(self) -> None:
        """Give the memory back."""
        self._held.clear()
        self.moves += 1


class Slab:
    """Keys and values of rows, by layer: `"row position (head channel)"`; position is the token's.

    Args:
        rows: How many.
        positions: Room for each.
        arena: Where the memory is; memory of its own if None.
    """

    def __init__(self, rows: int, positions: int, arena: Arena | None = None) -> None:
        self.rows, self.positions = rows, positions
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.windows: set[int] = set()
        """Attention windows that layers have asked for."""
        self._arena = arena

    def layer(self, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """One layer's keys and values, made for tensors `"token (head channel)"` like these."""
        if index not in self.keys:
            self.keys[index] = self._zeros(index, "keys", key)
            self.values[index] = self._zeros(index, "values", value)
        return self.keys[index], self.values[index]

    def _zeros(self, index: int, side: str, like: Tensor) -> Tensor:
        shape = self.rows, self.positions, like.shape[-1]
        if self._arena is None:
            return like.new_zeros(shape)
        return self._arena.take(index, side, shape, like)

    def keep_first(self, count: int) -> None:
        """Drop the rows behind these; nothing is copied."""
        self.rows = count
        for store in (self.keys, self.values):
            for index, tensor in store.items():
                store[index] = tensor[:count]

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these, which become 0, 1, 2, …"""
        self.rows = len(rows)
        for store in (self.keys, self.values):
            for index, tensor in store.items():
                kept = tensor.index_select(0, rows)
                store[index] = kept if self._arena is None else tensor[: len(rows)].copy_(kept)

    @property
    def bytes(self) -> int:
        """Memory of all layers."""
        tensors = [*self.keys.values(), *self.values.values()]
        return sum(t.numel() * t.element_size() for t in tensors)
