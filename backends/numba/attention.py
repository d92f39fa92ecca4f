"""Attention over neighbours in one pass: gather, softmax and weighted sum, nothing of size q·k·d ever stored."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from .certify import ring_slot
from .flat import flatten
from .search import query_blocks
from .threads import in_parallel


def attention(
    queries: np.ndarray, keys: np.ndarray, values: np.ndarray, positions: Any, scale: float, mask: Any, start: int
) -> Any:
    if positions is None or mask is not None:
        return NotImplemented
    lead, (queries, keys, values, positions) = flatten(queries, keys, values, positions)

    def work(b: int, some: slice, output: np.ndarray, lse: np.ndarray) -> None:
        over_neighbours(queries[b, some], keys[b], values[b], positions[b, some], scale, start, output, lse)

    return each_block(work, lead, (*queries.shape[:2], values.shape[2]), queries.dtype)


def averaged(scores: np.ndarray, values: np.ndarray, positions: np.ndarray, scale: float, start: int) -> Any:
    lead, (scores, values, positions) = flatten(scores, values, positions)

    def work(b: int, some: slice, output: np.ndarray, lse: np.ndarray) -> None:
        over_scored(scores[b, some], values[b], positions[b, some], scale, start, output, lse)

    return each_block(work, lead, (*scores.shape[:2], values.shape[2]), scores.dtype)


def each_block(work: Any, lead: tuple[int, ...], shape: tuple[int, int, int], dtype: Any) -> Any:
    """Output and lse, (b, q, width) and (b, q), which `work` fills for the queries of one block at a time."""
    output, lse = np.empty(shape, dtype), np.empty(shape[:2], dtype)
    blocks = query_blocks(shape[1], shape[0])
    in_parallel(work, [(b, some, output[b, some], lse[b, some]) for b in range(shape[0]) for some in blocks])
    return output.reshape(*lead, *shape[1:]), lse.reshape(*lead, shape[1])


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "arcp", "nsz"})
def over_neighbours(queries, keys, values, positions, scale, start, output, lse):
    n, k = keys.shape[0], positions.shape[1]
    scores = np.empty(k, queries.dtype)
    for i in range(queries.shape[0]):
        for j in range(k):
            if positions[i, j] >= 0:
                slot = ring_slot(positions[i, j], start, n)
                score = queries.dtype.type(0)
                for c in range(keys.shape[1]):
                    score += queries[i, c] * keys[slot, c]
                scores[j] = score * scale
        lse[i] = weighted(scores, values, positions[i], start, output[i])


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "arcp", "nsz"})
def over_scored(products, values, positions, scale, start, output, lse):
    scores = np.empty(positions.shape[1], products.dtype)
    for i in range(products.shape[0]):
        for j in range(positions.shape[1]):
            scores[j] = products[i, j] * scale
        lse[i] = weighted(scores, values, positions[i], start, output[i])


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "arcp", "nsz"})
def weighted(scores, values, positions, start, output):
    """The mean of values by e^score into `output`, and the log-sum-exp; scores are used up."""
    top, total = -np.inf, 0.0
    for j in range(positions.size):
        if positions[j] >= 0:
            top = max(top, scores[j])
    for j in range(positions.size):
        if positions[j] >= 0:
            scores[j] = np.exp(scores[j] - top)
            total += scores[j]
    output[:] = 0
    for j in range(positions.size):
        if positions[j] >= 0:
            slot = ring_slot(positions[j], start, values.shape[0])
            weight = scores.dtype.type(scores[j] / total)  # before the sum, which might overflow
            for c in range(values.shape[1]):
                output[c] += weight * values[slot, c]
    return top + np.log(total) if total > 0 else -np.inf
