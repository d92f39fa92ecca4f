"""Exact search: every key is scored, and the result is the k best by (score, newest), whatever the batch."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...backends.registry import current_backend, load
from ...core.retrieval import retrieve
from ..lock import ReadWriteLock
from .protocol import Ring


class ExactIndex:
    """The formula `retrieve` over a row's keys, or what the backend that computes keeps of them for exact search.

    With Numba that is the keys once more in another order, or, once a row has room for 32,768 tokens, codes of 8 bits
    (bytes: dim + 12 a key and head; float32 keys, "ip" and "cosine", where the CPU multiplies bytes). A key is taken in
    at the first search after its write, in O(heads dim), and once more when codes take over.
    """

    def __init__(self, heads: int, dim: int, space: str, dtype: np.dtype):
        self.shape, self.space, self.dtype = (heads, dim), space, dtype
        self.followed = 0  # tokens of the row's history that were taken in, or have left the row before
        self.kept: Any = None
        self.made_for = 0  # slots of the row for which `kept` is the kind that suits
        self.lock = ReadWriteLock().writing

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy starts empty, and follows the copied row at its first search."""
        heads, dim = self.shape
        return type(self), (heads, dim, self.space, self.dtype)

    def state(self) -> dict[str, np.ndarray]:
        """Nothing: the keys say all."""
        return {}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Nothing to restore."""

    def explain(self) -> str:
        return "every key is scored"

    @property
    def nbytes(self) -> int:
        return 0 if self.kept is None else self.kept.nbytes

    def search(self, row: Ring, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        make, stored = getattr(load(current_backend()), "exact_keys", None), (slice(None), slice(0, row.stored))
        if make is None:
            scores, ages = retrieve(queries, row.numbers("keys", stored), k, self.space, None, row.start)
        else:
            keys, _ = row.part("keys", stored)
            with self.lock:
                self.follow(row, make)
                self.kept.settle_down(keys)
            scores, ages = self.kept.search(keys, queries, k, row.start)
        return scores, np.where(ages >= 0, ages + row.oldest, -1)

    def follow(self, row: Ring, make: Any) -> None:
        """Take in the keys that came since; those that left were in the slots that the new ones take."""
        if self.kept is None or self.made_for != row.slots:
            self.made_for, made = row.slots, make(*self.shape, self.space, self.dtype, row.slots)
            if type(made) is not type(self.kept):
                self.kept, self.followed = made, 0
        if self.followed == row.written:
            return
        self.kept.grow(row.slots)
        for slots in written_since(row, self.followed):
            where = (slice(None), slots)
            keys, scales = row.part("keys", where) if self.kept.as_stored else (row.numbers("keys", where), None)
            self.kept.write(keys, scales, slots.start)
        self.followed = row.written


def written_since(row: Ring, position: int) -> list[slice]:
    """The slots of the tokens from `position` on that the row still holds, oldest first, as one or two ranges."""
    return written_between(row, max(position, row.oldest), row.written)


def written_between(row: Ring, first: int, last: int) -> list[slice]:
    """The slots of the tokens at positions first <= p < last, all of them held, oldest first, as one or two ranges."""
    ranges = []
    while first < last:
        slot = first % row.capacity
        count = min(last - first, row.capacity - slot)
        ranges.append(slice(slot, slot + count))
        first += count
    return ranges
