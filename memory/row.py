"""One row's (key, value) pairs: a ring that grows to its capacity, then overwrites its oldest.

A row is an object of its own, so no index arithmetic can reach another row, and forgetting is dropping the object.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..core.attention import attention, averaged
from .indexes.protocol import Index
from .storage import computing, decode, empty

SMALLEST = 64  # slots of the first allocation


class Row:
    """Keys (heads, n, dim), values (heads, n, value_dim) and tags (1, n) of the newest tokens of one document.

    The token at position p of the document's whole history stands in slot p % capacity.
    """

    def __init__(self, heads: int, dim: int, value_dim: int, capacity: int, dtype: str, index: Index):
        self.capacity, self.dtype, self.index = capacity, dtype, index
        self.written = 0  # tokens in the row's whole history
        self.arrays = {**empty("keys", (heads, 0, dim), dtype), **empty("values", (heads, 0, value_dim), dtype)}

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
    def slots(self) -> int:
        """Slots allocated."""
        return self.arrays["keys"].shape[1]

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self.arrays.values()) + self.index.nbytes

    @property
    def keys(self) -> np.ndarray:
        """Of every slot, as computed with."""
        return self.numbers("keys", ...)

    @property
    def values(self) -> np.ndarray:
        """Of every slot, as computed with."""
        return self.numbers("values", ...)

    @property
    def tags(self) -> np.ndarray | None:
        """Of every slot, (1, slots); None where no tags are kept."""
        return self.arrays.get("tags")

    def part(self, name: str, where: Any) -> tuple[np.ndarray, np.ndarray | None]:
        """The keys or values at `where` (an index of (heads, slots)), as stored, and their scales if they have any."""
        scales = self.arrays.get(f"{name}_scales")
        return self.arrays[name][where], None if scales is None else scales[where]

    def numbers(self, name: str, where: Any) -> np.ndarray:
        """The keys or values at `where` as they are computed with."""
        return decode(*self.part(name, where))

    def reserve(self, tokens: int, tagged: bool) -> None:
        """Allocate for `tokens` more."""
        self.arrays = self.grown(tokens, tagged)

    def grown(self, tokens: int, tagged: bool) -> dict[str, np.ndarray]:
        """The arrays with room for `tokens` more, and for their tags; the row's own where these have it."""
        arrays = self.arrays
        if tagged and "tags" not in arrays:
            arrays = {**arrays, "tags": np.full((1, self.slots), -1, np.int64)}
        needed = min(self.written + tokens, self.capacity)
        if needed <= self.slots:
            return arrays
        slots = min(max(needed, 2 * self.slots, SMALLEST), self.capacity)
        made = {name: np.empty((a.shape[0], slots, *a.shape[2:]), a.dtype) for name, a in arrays.items()}
        for name, array in arrays.items():
            made[name][:, : self.stored] = array[:, : self.stored]
        return made

    def write(self, parts: dict[str, np.ndarray], tags: np.ndarray | None) -> None:
        """Append `parts` (heads, n, ...), encoded, and tags (n,), of which the newest `capacity` stay."""
        self.accept(self.prepare(parts, tags))

    def prepare(self, parts: dict[str, np.ndarray], tags: np.ndarray | None) -> tuple[Any, ...]:
        """All of a `write` that can fail, while the row stays as it is; `accept` takes what it returns."""
        n = parts["keys"].shape[1]
        arrays = self.grown(n, tags is not None)
        if "tags" in arrays:
            parts = {**parts, "tags": np.full((1, n), -1) if tags is None else tags[None]}
        return arrays, parts

    def accept(self, prepared: tuple[Any, ...]) -> None:
        """The write that was prepared."""
        self.arrays, parts = prepared
        n = parts["keys"].shape[1]
        kept = min(n, self.capacity)
        done, first = n - kept, (self.written + n - kept) % self.capacity
        while done < n:  # in one piece, or two where the ring closes
            some = min(n - done, self.capacity - first)
            for name, part in parts.items():
                self.arrays[name][:, first : first + some] = part[:, done : done + some]
            done, first = done + some, 0
        self.written += n

    def saved(self) -> dict[str, np.ndarray]:
        """The arrays, (heads, stored, ...): all there is to a row but what it has written and its index."""
        return {name: array[:, : self.stored] for name, array in self.arrays.items()}

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores and positions in the whole history, (heads, q, k), of the k best for `queries` (heads, q, dim)."""
        return self.index.search(self, queries, k)

    def attend(
        self, queries: np.ndarray, positions: np.ndarray, scale: float, products: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Output (heads, q, value_dim) and lse (heads, q) of attention over the tokens at `positions` (heads, q, k).

        `products` are theirs with the queries, where a search has computed them: then no key is looked at again.
        """
        if self.stored == 0:
            shape, width = positions.shape[:2], self.arrays["values"].shape[2]
            return np.zeros((*shape, width), queries.dtype), np.full(shape, -np.inf, queries.dtype)
        values, ages, start = self._table("values", positions)
        if products is not None:
            return averaged(products, values, ages, scale, start)
        return attention(queries, self._table("keys", positions)[0], values, ages, scale, None, start)

    def _table(self, name: str, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
        """A ring of keys or values as computed with, where in it the tokens at `positions` are, and where it starts."""
        found = positions >= 0
        if self.dtype in ("float32", "float64"):
            return self.arrays[name][:, : self.stored], np.where(found, positions - self.oldest, -1), self.start
        (heads, q, k), width = positions.shape, self.arrays[name].shape[2]
        ages = np.where(found, np.arange(q * k).reshape(q, k), -1)
        return self.found(name, positions).reshape(heads, q * k, width), ages, 0  # only what was found is decoded

    def tags_at(self, positions: np.ndarray) -> np.ndarray | None:
        """Tags at `positions` (heads, q, k), -1 where the position is -1; None where no tags are kept."""
        if "tags" not in self.arrays or self.stored == 0:
            return np.full(positions.shape, -1, np.int64) if "tags" in self.arrays else None
        return np.where(positions >= 0, self.arrays["tags"][0, self.slots_of(positions)], -1)

    def slots_of(self, positions: np.ndarray) -> np.ndarray:
        """Where the tokens at `positions` stand; slot 0 for the position -1 of no token."""
        return np.where(positions >= 0, positions % self.capacity, 0)

    def gather(self, positions: np.ndarray) -> dict[str, Any]:
        """Keys, values and tags at `positions` (heads, q, k); zeros, and tag -1, where the position is -1."""
        return {name: self.found(name, positions) for name in ("keys", "values")} | {"tags": self.tags_at(positions)}

    def found(self, name: str, positions: np.ndarray) -> np.ndarray:
        """Keys or values (heads, q, k, width) at `positions` (heads, q, k); zeros where the position is -1."""
        if self.stored == 0:
            return np.zeros((*positions.shape, self.arrays[name].shape[2]), computing(self.dtype))
        there = (positions >= 0)[..., None]
        entries = self.numbers(name, (np.arange(positions.shape[0])[:, None, None], self.slots_of(positions)))
        return entries if there.all() else np.where(there, entries, computing(self.dtype).type(0))  # all, as a rule
