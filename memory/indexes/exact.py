"""Exact search: every key is scored, and the result is the k best by (score, newest), whatever the batch."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from ...backends.registry import current_backend, load
from ...core.retrieval import retrieve
from .protocol import Ring


class ExactIndex:
    """The formula `retrieve` over a row's keys, or the panels of the backend that computes, where it has them.

    Panels cost as many bytes again as the keys. A key takes its place in them once, at the first search after its
    write, in O(heads dim).
    """

    def __init__(self, heads: int, dim: int, space: str, dtype: np.dtype):
        self.shape, self.space, self.dtype = (heads, dim), space, dtype
        self.followed = 0  # tokens of the row's history that stand in the panels, or have left the row before
        self.panels: Any = None
        self.lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy starts empty, and follows the copied row at its first search."""
        heads, dim = self.shape
        return type(self), (heads, dim, self.space, self.dtype)

    @property
    def nbytes(self) -> int:
        return 0 if self.panels is None else self.panels.nbytes

    def search(self, row: Ring, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        made = getattr(load(current_backend()), "Panels", None)
        if made is None:
            scores, ages = retrieve(queries, row.keys[:, : row.stored], k, self.space, None, row.start)
        else:
            with self.lock:
                self.follow(row, made)
            scores, ages = self.panels.search(queries, k, row.stored, row.start)
        return scores, np.where(ages >= 0, ages + row.oldest, -1)

    def follow(self, row: Ring, made: Any) -> None:
        """Write the keys that came since into the panels; those that left are in the slots that the new ones take."""
        if self.panels is None:
            self.panels, self.followed = made(*self.shape, self.space, self.dtype), 0
        if self.followed == row.written:
            return
        self.panels.grow(row.keys.shape[1])
        position = max(self.followed, row.oldest)
        while position < row.written:
            slot = position % row.capacity
            count = min(row.written - position, row.capacity - slot)
            self.panels.write(row.keys[:, slot : slot + count], slot)
            position += count
        self.followed = row.written
