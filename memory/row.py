"""One row's (key, value) pairs: a ring that grows to its capacity, then overwrites its oldest.

A row is an object of its own, so no index arithmetic can reach another row, and forgetting is dropping the object.
"""

from __future__ import annotations

import numpy as np

from ..core.attention import attention
from .indexes.protocol import Index

SMALLEST = 64  # slots of the first allocation


class Row:
    """Keys (heads, n, dim), values (heads, n, value_dim) and tags (1, n) of the newest tokens of one document.

    The token at position p of the document's whole history stands in slot p % capacity.
    """

    def __init__(self, heads: int, dim: int, value_dim: int, capacity: int, dtype: np.dtype, index: Index):
        self.capacity, self.index = capacity, index
        self.written = 0  # tokens in the row's whole history
        self.keys = np.empty((heads, 0, dim), dtype)
        self.values = np.empty((heads, 0, value_dim), dtype)
        self.tags: np.ndarray | None = None  # (1, n), from the first tagged write on

    @property
    def stored(self) -> int:
        """Tokens held now."""
        return min(self.written, self.capacity)

    @property
    def oldest(self) -> int:
        """Position of the oldest token held."""
        return self.written - self.stored

    @property
    def start(self) -> int:
        """Slot of the oldest token held."""
        return self.oldest % self.capacity

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self.arrays().values()) + self.index.nbytes

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays by name, as they are allocated."""
        arrays = {"keys": self.keys, "values": self.values}
        return arrays if self.tags is None else {**arrays, "tags": self.tags}

    def reserve(self, tokens: int, tagged: bool) -> None:
        """Allocate for `tokens` more; all that can fail in a write fails here, before anything has changed."""
        allocated = self.keys.shape[1]
        if tagged and self.tags is None:
            self.tags = np.full((1, allocated), -1, np.int64)
        needed = min(self.written + tokens, self.capacity)
        if needed <= allocated:
            return
        slots = min(max(needed, 2 * allocated, SMALLEST), self.capacity)
        grown = {name: np.empty((a.shape[0], slots, *a.shape[2:]), a.dtype) for name, a in self.arrays().items()}
        for name, array in self.arrays().items():
            grown[name][:, : self.stored] = array[:, : self.stored]
        self.__dict__.update(grown)

    def write(self, keys: np.ndarray, values: np.ndarray, tags: np.ndarray | None) -> None:
        """Append keys (heads, n, dim), values (heads, n, value_dim), tags (n,), of which the newest `capacity` stay."""
        n = keys.shape[1]
        self.reserve(n, tags is not None)
        kept = min(n, self.capacity)
        slots = np.arange(self.written + n - kept, self.written + n) % self.capacity
        self.keys[:, slots] = keys[:, n - kept :]
        self.values[:, slots] = values[:, n - kept :]
        if self.tags is not None:
            self.tags[:, slots] = -1 if tags is None else tags[n - kept :]
        self.written += n

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores and positions in the whole history, (heads, q, k), of the k best for `queries` (heads, q, dim)."""
        return self.index.search(self, queries, k)

    def attend(self, queries: np.ndarray, positions: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
        """Output (heads, q, value_dim) and lse (heads, q) of attention over the tokens at `positions` (heads, q, k)."""
        ages = np.where(positions >= 0, positions - self.oldest, -1)
        if self.stored == 0:
            shape = positions.shape[:2]
            return np.zeros((*shape, self.values.shape[2]), queries.dtype), np.full(shape, -np.inf, queries.dtype)
        stored = slice(0, self.stored)
        return attention(queries, self.keys[:, stored], self.values[:, stored], ages, scale, None, self.start)

    def tags_at(self, positions: np.ndarray) -> np.ndarray | None:
        """Tags at `positions` (heads, q, k), -1 where the position is -1; None where no tags are kept."""
        if self.tags is None or self.stored == 0:
            return None if self.tags is None else np.full(positions.shape, -1, np.int64)
        return np.where(positions >= 0, self.tags[0, self.slots(positions)], -1)

    def slots(self, positions: np.ndarray) -> np.ndarray:
        """Where the tokens at `positions` stand; slot 0 for the position -1 of no token."""
        return np.where(positions >= 0, positions % self.capacity, 0)

    def gather(self, positions: np.ndarray) -> dict[str, np.ndarray | None]:
        """Keys, values and tags at `positions` (heads, q, k); zeros, and tag -1, where the position is -1."""
        heads = np.arange(positions.shape[0])[:, None, None]
        slots, found = self.slots(positions), (positions >= 0)[..., None]
        taken = {"tags": self.tags_at(positions)}
        for name, array in (("keys", self.keys), ("values", self.values)):
            entries = np.zeros((*positions.shape, array.shape[2]), array.dtype)
            if self.stored:
                np.multiply(array[heads, slots], found, out=entries)
            taken[name] = entries
        return taken
