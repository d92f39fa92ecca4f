"""The scan over all keys: the tile passes over the many, the few that beat a query's worst kept one go to its heap.

Panels are visited from the newest to the oldest and a key must exceed the k-th best score so far: so of equal scores
the newest is kept, and keys that are all alike cost nothing once the first k are in.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from .heap import offer, order
from .tile import FEW, MANY, ONE, highest_bit, make_tile, panel_counts

one, few, many = (make_tile(*shape, l2=False) for shape in (ONE, FEW, MANY))
one_l2, few_l2, many_l2 = (make_tile(*shape, l2=True) for shape in (ONE, FEW, MANY))
NO_SCALES = np.zeros((0, 0), np.float32)  # of keys that have none
panels_a_tile = panel_counts(ONE, FEW, MANY)
SAMPLED = 32  # one tile in so many is looked at beforehand


@njit(inline="always")
def score(panels, scales, panel, grouped, group, bounds, scores, hits, l2):
    """Run the tile that fits the groups' size. Inlined: to hand over so many arrays would cost as much as a tile."""
    queries = grouped.shape[2]
    if l2:
        if queries == ONE[1]:
            return one_l2(panels, scales, panel, grouped, group, bounds, scores, hits)
        if queries == FEW[1]:
            return few_l2(panels, scales, panel, grouped, group, bounds, scores, hits)
        return many_l2(panels, scales, panel, grouped, group, bounds, scores, hits)
    if queries == ONE[1]:
        return one(panels, scales, panel, grouped, group, bounds, scores, hits)
    if queries == FEW[1]:
        return few(panels, scales, panel, grouped, group, bounds, scores, hits)
    return many(panels, scales, panel, grouped, group, bounds, scores, hits)


@njit(cache=True, nogil=True)
def below(bit):
    """The word whose bits below `bit` are set."""
    return np.int64(-1) if bit >= 64 else np.int64(2**63 - 1) >> np.int64(63 - bit)


@njit(cache=True, nogil=True)
def scan(panels, scales, low, high, shift, grouped, bounds, best, places, mask, l2):
    """Offer the keys in slots low <= s < high, at positions s + shift, to every query's heap, the newest first.

    `bounds[i]` is the worst score in heap i, and +inf for the queries that only fill up the last group.
    """
    queries = grouped.shape[2]
    wide = panels_a_tile(queries)
    span = wide * panels.shape[2]
    scores, hits = np.empty(queries * span, grouped.dtype), np.empty(queries, np.int64)
    for block in range((high - 1) // span, low // span - 1, -1):
        first = block * span
        inside = below(high - first) & ~below(max(low - first, 0))
        group = -1
        while True:
            group = score(panels, scales, block * wide, grouped, group + 1, bounds, scores, hits, l2)
            if group == grouped.shape[0]:
                break
            for j in range(queries):
                i, word = group * queries + j, hits[j] & inside
                while word != 0:
                    lane = highest_bit(word)
                    word &= below(lane)
                    position = first + lane + shift
                    if scores[j * span + lane] > bounds[i] and (mask.size == 0 or mask[i, position]):
                        offer(scores[j * span + lane], position, best[i], places[i])
                        bounds[i] = best[i, 0]


@njit(cache=True, nogil=True)
def sample(panels, scales, stored, step, grouped, maxima, l2):
    """Fill maxima (queries, m) with the largest scores of disjoint sets of keys, out of every `step`-th tile.

    Only tiles whose slots all lie below `stored` count, and m must be a multiple of a tile's keys.
    """
    queries = grouped.shape[2]
    wide = panels_a_tile(queries)
    span = wide * panels.shape[2]
    scores, hits = np.empty(queries * span, grouped.dtype), np.empty(queries, np.int64)
    bounds = np.full(grouped.shape[0] * queries, -np.inf, grouped.dtype)
    maxima[:] = -np.inf
    column = 0
    for block in range(step - 1, stored // span, step):
        for group in range(grouped.shape[0]):
            score(panels, scales, block * wide, grouped, group, bounds, scores, hits, l2)
            for j in range(min(queries, maxima.shape[0] - group * queries)):
                i = group * queries + j
                for lane in range(span):
                    maxima[i, column + lane] = max(maxima[i, column + lane], scores[j * span + lane])
        column = (column + span) % maxima.shape[1]


@njit(cache=True, nogil=True)
def kth_largest(numbers, k):
    """The k-th largest of `numbers` (n,), n >= k, which are reordered. Source: Hoare, "Find" (CACM 1961)."""
    first, last = 0, numbers.shape[0] - 1
    while first < last:
        pivot, i, j = numbers[(first + last) // 2], first, last
        while i <= j:
            while numbers[i] > pivot:
                i += 1
            while numbers[j] < pivot:
                j -= 1
            if i <= j:
                numbers[i], numbers[j] = numbers[j], numbers[i]
                i, j = i + 1, j - 1
        if k - 1 <= j:
            last = j
        elif k - 1 >= i:
            first = i
        else:
            break
    return numbers[k - 1]


@njit(cache=True, nogil=True)
def kth_largest_rows(rows, k, bounds):
    """Of every row (queries, n), reordered, the k-th largest."""
    for i in range(rows.shape[0]):
        bounds[i] = kth_largest(rows[i], k)


@njit(cache=True, nogil=True)
def scan_ring(panels, scales, stored, start, grouped, best, places, l2):
    """Fill best and places (q, k), best first, with scores and ages of the best keys in slots below `stored`.

    The keys are a ring whose oldest is at slot `start`. The scan starts from scores that k keys are sure to exceed: the
    k-th largest of the maxima of disjoint sets of keys. Without it a scan is at the mercy of the order: a memory whose
    older keys are the better ones, always.
    """
    (q, k), queries = best.shape, grouped.shape[2]
    bounds = np.full(grouped.shape[0] * queries, np.inf, grouped.dtype)
    bounds[:q], places[:] = -np.inf, -1
    span = panels_a_tile(queries) * panels.shape[2]
    buckets = (4 * k + span - 1) // span * span
    if stored >= SAMPLED * buckets:
        maxima = np.empty((q, buckets), grouped.dtype)
        sample(panels, scales, stored, SAMPLED, grouped, maxima, l2)
        kth_largest_rows(maxima, k, bounds)
        for i in range(q):
            bounds[i] = np.nextafter(bounds[i], grouped.dtype.type(-np.inf))
    for i in range(q):
        best[i] = bounds[i]
    nothing = np.zeros((0, 0), np.bool_)
    for low, high, shift in ((0, start, stored - start), (start, stored, -start)):
        if low < high:
            scan(panels, scales, low, high, shift, grouped, bounds, best, places, nothing, l2)
    order(best, places)
