"""Exact search of a few queries through panels: the state of one such search, and how many run at once."""

from __future__ import annotations

import numpy as np

from . import threads
from .heap import order
from .panels import grouped
from .scan import kth_largest_rows, panels_a_tile, sample, scan
from .tile import FEW, MANY, ONE

RESIDENT = 1 << 17  # bytes of queries that stay in the second-level cache while all panels pass by
SAMPLED = 32  # one tile in so many is looked at beforehand
NOTHING = np.zeros((0, 0), bool)


class Search:
    """The k best keys of queries (q, d) so far: heaps that `visit` offers keys to, the newest range first."""

    def __init__(self, queries: np.ndarray, k: int, space: str):
        q = queries.shape[0]
        size = next((size for _, size in (ONE, FEW) if q <= size), MANY[1])
        self.queries, self.k, self.l2 = grouped(queries, size), k, space == "l2"
        self.scores, self.places = np.full((q, k), -np.inf, queries.dtype), np.full((q, k), -1, np.int64)
        self.bounds = np.full(self.queries.shape[0] * size, np.inf, queries.dtype)
        self.bounds[:q] = -np.inf

    def sample(self, panels: np.ndarray, scales: np.ndarray, stored: int) -> None:
        """Start from scores that k keys are sure to exceed: the k-th largest of the maxima of disjoint sets of keys.

        Without it a scan is at the mercy of the order: a memory whose older keys are the better ones, always.
        """
        span = panels_a_tile(self.queries.shape[2]) * panels.shape[2]
        buckets = -(-4 * self.k // span) * span
        if stored < SAMPLED * buckets:
            return
        q = self.scores.shape[0]
        maxima = np.empty((q, buckets), self.scores.dtype)
        sample(panels, scales, stored, SAMPLED, self.queries, maxima, self.l2)
        kth_largest_rows(maxima, self.k, self.bounds[:q])
        self.bounds[:q] = np.nextafter(self.bounds[:q], self.bounds.dtype.type(-np.inf))
        self.scores[:] = self.bounds[:q, None]

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


def query_blocks(q: int, d: int, itemsize: int, batch: int) -> list[slice]:
    """Queries to search together: as many as stay in cache, but enough blocks to employ every thread."""
    most = max(RESIDENT // max(d * itemsize, 1), 1)
    shares = -(-threads.limit() // max(batch, 1))
    size = max(min(most, -(-q // shares)), 1)
    size = -(-size // MANY[1]) * MANY[1]
    return [slice(first, min(first + size, q)) for first in range(0, q, size)]
