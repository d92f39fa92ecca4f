"""From bounds to the exact result: which keys may be among a query's k best, and which of them are.

Every key's score lies between a lower and an upper end (code_tile.py). The k-th largest lower end met so far is a
bound that at least k keys reach. A key whose upper end does not exceed it cannot displace them, for they are newer; all
others are candidates. Those left at the end are scored in full, so that nothing of the codes remains in the result.
"""

from __future__ import annotations

import numpy as np
from numba import config, njit

from .code_tile import FEW, MANY, ONE, make_code_tile
from .heap import offer
from .scan import below
from .tile import fused, highest_bit
from .unit import normalise
from .vectors import compiled_fma

one, few, many = (make_code_tile(*shape) for shape in (ONE, FEW, MANY))
fma = fused if config.DISABLE_JIT else compiled_fma
HELPLESS = -1  # the count of a query with more candidates than there is room for


@njit(cache=True, nogil=True)
def panels_a_tile(queries):
    """How many panels the tile for groups of that many queries takes."""
    if queries == ONE[1]:
        return ONE[0]
    return FEW[0] if queries == FEW[1] else MANY[0]


@njit(inline="always")
def ends(keys, panel, asked, group, bounds, low, high, hits):
    """Run the tile that fits the groups' size; `keys` and `asked` are the tile's arguments of those kinds."""
    codes, scale, error, size = keys
    words, sums, reach, slip = asked
    queries = words.shape[2] // 4
    if queries == ONE[1]:
        return one(codes, scale, error, size, panel, words, sums, reach, slip, group, bounds, low, high, hits)
    if queries == FEW[1]:
        return few(codes, scale, error, size, panel, words, sums, reach, slip, group, bounds, low, high, hits)
    return many(codes, scale, error, size, panel, words, sums, reach, slip, group, bounds, low, high, hits)


@njit(cache=True, nogil=True)
def narrow(keys, first_slot, last_slot, shift, asked, bounds, lows, nowhere, places, highs, counts):
    """Collect the candidates in slots first_slot <= s < last_slot, at positions s + shift, the newest first.

    `lows` (q, k) are heaps of the largest lower ends, `places` and `highs` (q, room) the candidates, `counts` (q,) how
    many there are. A query is given up, its count HELPLESS, when its room is full of keys that the bounds cannot tell
    apart.
    """
    queries = asked[0].shape[2] // 4
    wide = panels_a_tile(queries)
    span = wide * keys[1].shape[1]
    low, high = np.empty(queries * span, np.float32), np.empty(queries * span, np.float32)
    hits = np.empty(queries, np.int64)
    for block in range((last_slot - 1) // span, first_slot // span - 1, -1):
        first = block * span
        inside = below(last_slot - first) & ~below(max(first_slot - first, 0))
        group = -1
        while True:
            group = ends(keys, block * wide, asked, group + 1, bounds, low, high, hits)
            if group == asked[0].shape[0]:
                break
            for j in range(queries):
                i, word = group * queries + j, hits[j] & inside
                while word != 0:
                    lane = highest_bit(word)
                    word &= below(lane)
                    if high[j * span + lane] > bounds[i]:
                        if counts[i] == places.shape[1]:
                            prune(i, bounds, places, highs, counts)
                            if counts[i] > 3 * places.shape[1] // 4:
                                counts[i], bounds[i] = HELPLESS, np.inf
                                break
                        places[i, counts[i]], highs[i, counts[i]] = first + lane + shift, high[j * span + lane]
                        counts[i] += 1
                        if low[j * span + lane] > lows[i, 0]:
                            offer(low[j * span + lane], 0, lows[i], nowhere[i])
                            bounds[i] = lows[i, 0]


@njit(cache=True, nogil=True)
def prune(i, bounds, places, highs, counts):
    """Drop the candidates of query i that fell below the bound since."""
    if counts[i] == HELPLESS:
        return
    kept = 0
    for u in range(counts[i]):
        if highs[i, u] >= bounds[i]:
            places[i, kept], highs[i, kept] = places[i, u], highs[i, u]
            kept += 1
    counts[i] = kept


@njit(cache=True, nogil=True)
def sample(keys, stored, step, asked, maxima):
    """Fill maxima (queries, m) with the largest lower ends of disjoint sets of keys, out of every `step`-th tile."""
    queries = asked[0].shape[2] // 4
    wide = panels_a_tile(queries)
    span = wide * keys[1].shape[1]
    low, high = np.empty(queries * span, np.float32), np.empty(queries * span, np.float32)
    hits, bounds = np.empty(queries, np.int64), np.full(asked[0].shape[0] * queries, -np.inf, np.float32)
    maxima[:] = -np.inf
    column = 0
    for block in range(step - 1, stored // span, step):
        for group in range(asked[0].shape[0]):
            ends(keys, block * wide, asked, group, bounds, low, high, hits)
            for j in range(min(queries, maxima.shape[0] - group * queries)):
                row = maxima[group * queries + j]
                for lane in range(span):
                    row[column + lane] = max(row[column + lane], low[j * span + lane])
        column = (column + span) % maxima.shape[1]


@njit(cache=True, nogil=True)
def settle(queries, keys, start, unit, bounds, places, highs, counts, best, best_places):
    """Score the candidates that are left in full, each by its chain, and offer them to the heaps best, best_places."""
    stored, d = keys.shape
    some = np.empty((4, d), np.float32)
    for i in range(queries.shape[0]):
        prune(i, bounds, places, highs, counts)
        for u in range(0, counts[i], 4):
            for v in range(4):
                slot = (places[i, min(u + v, counts[i] - 1)] + start) % stored
                for c in range(d):
                    some[v, c] = keys[slot, c]
            if unit:
                normalise(some, some)
            s0 = s1 = s2 = s3 = np.float32(0)
            for c in range(d):  # four chains side by side hide the latency of one
                query = queries[i, c]
                s0, s1 = fma(query, some[0, c], s0), fma(query, some[1, c], s1)
                s2, s3 = fma(query, some[2, c], s2), fma(query, some[3, c], s3)
            for v, score in enumerate((s0, s1, s2, s3)):
                if u + v < counts[i]:
                    offer(score, places[i, u + v], best[i], best_places[i])
