"""Exact search of a few queries through panels: the state of one such search, and how many run at once."""

from __future__ import annotations

import numpy as np

from . import threads
from .heap import order
from .panels import grouped
from .scan import scan
from .tile import FEW, MANY, ONE

RESIDENT = 1 << 17  # bytes of queries that stay in the second-level cache while all panels pass by
NOTHING = np.zeros((0, 0), bool)


class Search:
    """The k best keys of queries (q, d) so far: heaps that `visit` offers keys to, the newest range first."""

    def __init__(self, queries: np.ndarray, k: int, space: str):
        q, size = queries.shape[0], group_size(queries.shape[0])
        self.queries, self.l2 = grouped(queries, size), space == "l2"
        self.scores, self.places = np.full((q, k), -np.inf, queries.dtype), np.full((q, k), -1, np.int64)
        self.bounds = np.full(self.queries.shape[0] * size, np.inf, queries.dtype)
        self.bounds[:q] = -np.inf

    def visit(
        self, panels: np.ndarray, scales: np.ndarray, low: int, high: int, shift: int, mask: np.ndarray = NOTHING
    ) -> None:
        """Offer the keys in slots low <= s < high, which are at positions s + shift."""
        if low < high:
            scan(panels, scales, low, high, shift, self.queries, self.bounds, self.scores, self.places, mask, self.l2)

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Scores and positions (q, k), best first, ties to the newest."""
        order(self.scores, self.places)
        return self.scores, self.places


def group_size(q: int) -> int:
    """How many of q queries a tile takes."""
    return ONE[1] if q <= ONE[1] else FEW[1] if q <= FEW[1] else MANY[1]


def resident(d: int, itemsize: int) -> int:
    """How many queries stay in cache while all keys pass by."""
    return max(RESIDENT // max(d * itemsize, 1), 1)


def query_blocks(q: int, batch: int, most: int | None = None) -> list[slice]:
    """Queries to search together: at most so many, and enough blocks to employ every thread."""
    shares = -(-threads.limit() // max(batch, 1))
    size = max(-(-q // shares), 1)
    size = -(-(size if most is None else min(size, most)) // MANY[1]) * MANY[1]
    return [slice(first, min(first + size, q)) for first in range(0, q, size)]
