"""Attention over neighbours in one pass: gather, softmax and weighted sum, nothing of size q·k·d ever stored."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from . import threads
from .certify import ring_slot
from .flat import flatten


def attention(
    queries: np.ndarray, keys: np.ndarray, values: np.ndarray, positions: Any, scale: float, mask: Any, start: int
) -> Any:
    if positions is None or mask is not None:
        return NotImplemented
    lead, (queries, keys, values, positions) = flatten(queries, keys, values, positions)
    output = np.empty((*queries.shape[:2], values.shape[2]), queries.dtype)
    lse = np.empty(queries.shape[:2], queries.dtype)
    shares = -(-threads.limit() // max(queries.shape[0], 1))
    size = max(-(-queries.shape[1] // shares), 1)

    def work(b: int, some: slice) -> None:
        over_neighbours(
            queries[b, some], keys[b], values[b], positions[b, some], scale, start, output[b, some], lse[b, some]
        )

    blocks = [slice(first, first + size) for first in range(0, queries.shape[1], size)]
    threads.in_parallel(work, [(b, some) for b in range(queries.shape[0]) for some in blocks])
    return output.reshape(*lead, *output.shape[1:]), lse.reshape(*lead, *lse.shape[1:])


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "arcp", "nsz"})
def over_neighbours(queries, keys, values, positions, scale, start, output, lse):
    n, k, width = keys.shape[0], positions.shape[1], values.shape[1]
    scores = np.empty(k, queries.dtype)
    for i in range(queries.shape[0]):
        top = -np.inf
        for j in range(k):
            if positions[i, j] >= 0:
                slot = ring_slot(positions[i, j], start, n)
                score = queries.dtype.type(0)
                for c in range(keys.shape[1]):
                    score += queries[i, c] * keys[slot, c]
                scores[j] = score * scale
                top = max(top, scores[j])
        total = 0.0
        for j in range(k):
            if positions[i, j] >= 0:
                scores[j] = np.exp(scores[j] - top)
                total += scores[j]
        output[i, :] = 0
        for j in range(k):
            if positions[i, j] >= 0:
                slot = ring_slot(positions[i, j], start, n)
                weight = queries.dtype.type(scores[j] / total)  # before the sum, which might overflow
                for c in range(width):
                    output[i, c] += weight * values[slot, c]
        lse[i] = top + np.log(total) if total > 0 else -np.inf
