"""Exact top-k without ever holding all scores: BLAS scores a block of keys, a heap a query keeps the k best."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from .flat import flatten

BLOCK = 2048  # keys scored at once: with 512 queries, 4 MiB of float32 scores that stay in the last-level cache


def retrieve(queries: np.ndarray, keys: np.ndarray, k: int, space: str, mask: Any, start: int) -> Any:
    if space != "ip" or mask is not None:
        return NotImplemented
    lead, (queries, keys) = flatten(queries, keys)
    (batch, q, _), n = queries.shape, keys.shape[1]
    scores = np.full((batch, q, k), -np.inf, queries.dtype)
    positions = np.full((batch, q, k), -1, np.int64)
    for b in range(batch):
        for first in range(0, n, BLOCK):
            slots = np.arange(first, min(first + BLOCK, n))
            block = queries[b] @ keys[b, slots[0] : slots[-1] + 1].T
            keep_best(block, (slots - start) % n, scores[b], positions[b])
    order(scores.reshape(-1, k), positions.reshape(-1, k))
    return scores.reshape(*lead, q, k), positions.reshape(*lead, q, k)


@njit(cache=True, nogil=True)
def worse(score, position, other_score, other_position):
    """Whether the first entry comes after the other: lower score, or the older of equals."""
    return score < other_score or (score == other_score and position < other_position)


@njit(cache=True, nogil=True)
def sift(scores, positions, root, size):
    """Restore the heap below `root`: no entry is worse than its parent, so the worst stands at 0."""
    while True:
        child = 2 * root + 1
        if child >= size:
            return
        if child + 1 < size and worse(scores[child + 1], positions[child + 1], scores[child], positions[child]):
            child += 1
        if not worse(scores[child], positions[child], scores[root], positions[root]):
            return
        scores[root], scores[child] = scores[child], scores[root]
        positions[root], positions[child] = positions[child], positions[root]
        root = child


@njit(cache=True, nogil=True)
def keep_best(block, block_positions, scores, positions):
    """Put every entry of `block` (q, m) that beats the worst kept one into the heaps `scores`, `positions` (q, k)."""
    k = scores.shape[1]
    for i in range(block.shape[0]):
        heap, where, row = scores[i], positions[i], block[i]
        for j in range(row.shape[0]):
            if row[j] >= heap[0] and worse(heap[0], where[0], row[j], block_positions[j]):
                heap[0], where[0] = row[j], block_positions[j]
                sift(heap, where, 0, k)


@njit(cache=True, nogil=True)
def order(scores, positions):
    """Sort every heap (rows, k), best first."""
    for i in range(scores.shape[0]):
        heap, where = scores[i], positions[i]
        for last in range(heap.shape[0] - 1, 0, -1):
            heap[0], heap[last] = heap[last], heap[0]
            where[0], where[last] = where[last], where[0]
            sift(heap, where, 0, last)
