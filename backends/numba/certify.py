"""From bounds to the exact result: which keys may be among a query's k best, and which of them are.

Every key's score lies between a lower and an upper end (code_tile.py). The k-th largest lower end met so far is a
bound that at least k keys reach. A key whose upper end does not exceed it cannot displace them, for they are newer; all
others are candidates. Those left at the end are scored in full, so that nothing of the codes remains in the result.
"""

from __future__ import annotations

import numpy as np
from numba import config, njit

from .code_tile import FEW, MANY, ONE, make_code_tile, make_highest
from .eight import TOGETHER, chains
from .heap import offer, order
from .scan import below, kth_largest
from .tile import highest_bit, panel_counts
from .unit import normalise
from .vectors import compiled_prefetch, plain_prefetch

one, few, many = (make_code_tile(*shape) for shape in (ONE, FEW, MANY))
highest_one, highest_few, highest_many = (make_highest(*shape) for shape in (ONE, FEW, MANY))
panels_a_tile = panel_counts(ONE, FEW, MANY)
prefetch = plain_prefetch if config.DISABLE_JIT else compiled_prefetch
AHEAD = 4 * TOGETHER  # candidates whose keys are on their way while others are scored
HELPLESS = -1  # the count of a query with more candidates than there is room for
PATIENCE = 64  # candidates at least between one look at a query's bound and the next


@njit(cache=True, nogil=True)
def no_candidates(q, k, room):
    """Room for the candidates of q queries: their places, lower and upper ends (q, room), how many there are, and at

    how many the bound is looked at again (q,).
    """
    low, high = np.empty((q, room), np.float32), np.empty((q, room), np.float32)
    return np.empty((q, room), np.int64), low, high, np.zeros(q, np.int64), np.full(q, min(max(k, PATIENCE), room))


@njit(inline="always")
def ends(keys, panel, asked, group, bounds, low, high, hits):
    """Run the tile that fits the groups' size; `keys` and `asked` are the tile's arguments of those kinds."""
    codes, scale, error, size = keys
    words, starts, reach, ratio = asked
    queries = words.shape[2] // 4
    if queries == ONE[1]:
        return one(codes, scale, error, size, panel, words, starts, reach, ratio, group, bounds, low, high, hits)
    if queries == FEW[1]:
        return few(codes, scale, error, size, panel, words, starts, reach, ratio, group, bounds, low, high, hits)
    return many(codes, scale, error, size, panel, words, starts, reach, ratio, group, bounds, low, high, hits)


@njit(cache=True, nogil=True)
def narrow(keys, first_slot, last_slot, shift, asked, k, bounds, candidates):
    """Collect the candidates in slots first_slot <= s < last_slot, at positions s + shift, the newest first.

    A query is given up, its count HELPLESS, when its room is full of keys that the bounds cannot tell apart.
    """
    places, lows, highs, counts, marks = candidates  # once: to take them out of the tuple costs as much as a candidate
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
                    at = j * span + lane
                    if high[at] > bounds[i]:
                        if counts[i] == marks[i]:
                            tighten(i, k, bounds, candidates, True)
                        if counts[i] != HELPLESS:
                            keep(i, first + lane + shift, low[at], high[at], places, lows, highs, counts)


@njit(inline="always")
def keep(i, place, low, high, places, lows, highs, counts):
    """Take in a candidate of query i."""
    places[i, counts[i]], lows[i, counts[i]], highs[i, counts[i]] = place, low, high
    counts[i] += 1


@njit(cache=True, nogil=True)
def reaching(i, bound, candidates):
    """Drop the candidates of query i whose upper ends are below a bound; returns how many are left."""
    places, lows, highs, counts, _ = candidates
    kept = 0
    for u in range(counts[i]):
        if highs[i, u] >= bound:
            places[i, kept], lows[i, kept], highs[i, kept] = places[i, u], lows[i, u], highs[i, u]
            kept += 1
    return kept


@njit(cache=True, nogil=True)
def tighten(i, k, bounds, candidates, sure):
    """Raise the bound of query i to the k-th largest lower end and drop the candidates below it; or, if that leaves

    no room, give the query up, with a bound that nothing exceeds. If not `sure`, keep the better half instead.
    """
    places, lows, highs, counts, marks = candidates
    count, room = counts[i], places.shape[1]
    if count >= k:
        bounds[i] = max(bounds[i], kth_largest(lows[i, :count].copy(), k))
    kept = reaching(i, bounds[i], candidates)
    if count == room and kept > room // 2 and not sure:
        bounds[i] = kth_largest(highs[i, :kept].copy(), room // 2)
        counts[i] = kept
        kept = reaching(i, bounds[i], candidates)
    if count == room and kept > 3 * room // 4:
        counts[i], bounds[i] = HELPLESS, np.inf
    else:
        counts[i], marks[i] = kept, min(kept + max(k, kept, PATIENCE), room)


@njit(cache=True, nogil=True)
def sample(keys, stored, step, asked, maxima):
    """Fill maxima (queries, m) with the largest lower ends of disjoint sets of keys, out of every `step`-th tile.

    They fill up the last group of queries, and m must be a multiple of a tile's keys.
    """
    codes, scale, error, size = keys
    words, starts, reach, ratio = asked
    queries = words.shape[2] // 4
    wide = panels_a_tile(queries)
    span, column = wide * scale.shape[1], 0
    maxima[:] = -np.inf
    for block in range(step - 1, stored // span, step):
        into = maxima[:, column : column + span]
        if queries == ONE[1]:
            highest_one(codes, scale, error, size, block * wide, words, starts, reach, ratio, into)
        elif queries == FEW[1]:
            highest_few(codes, scale, error, size, block * wide, words, starts, reach, ratio, into)
        else:
            highest_many(codes, scale, error, size, block * wide, words, starts, reach, ratio, into)
        column = (column + span) % maxima.shape[1]


@njit(cache=True, nogil=True)
def ring_slot(age, start, stored):
    """Where the key of that age stands in a ring whose oldest is at `start`."""
    slot = age + start
    return slot if slot < stored else slot - stored  # a division would take as long as all products of a row


@njit(cache=True, nogil=True)
def settle(queries, keys, start, unit, candidates, best, best_places):
    """Score the candidates that are left in full, and offer them to the heaps best, best_places (q, k)."""
    places, counts = candidates
    stored, d = keys.shape
    rows, own, scores = np.empty(TOGETHER, np.int64), np.arange(TOGETHER), np.empty(TOGETHER, np.float32)
    directed = np.empty((TOGETHER, d), np.float32)
    for i in range(queries.shape[0]):
        if i + 1 < queries.shape[0]:
            for u in range(min(AHEAD, counts[i + 1])):
                prefetch(keys, ring_slot(places[i + 1, u], start, stored))
        for first in range(0, counts[i], TOGETHER):
            for u in range(first + AHEAD, min(first + AHEAD + TOGETHER, counts[i])):
                prefetch(keys, ring_slot(places[i, u], start, stored))
            for u in range(TOGETHER):
                rows[u] = ring_slot(places[i, min(first + u, counts[i] - 1)], start, stored)
            if unit:
                for u in range(TOGETHER):
                    directed[u] = keys[rows[u]]
                normalise(directed, directed)
                chains(directed, own, queries[i], scores)
            else:
                chains(keys, rows, queries[i], scores)
            for u in range(first, min(first + TOGETHER, counts[i])):
                if scores[u - first] >= best[i, 0]:
                    offer(scores[u - first], places[i, u], best[i], best_places[i])


@njit(cache=True, nogil=True)
def best_of(queries, keys, stored, oldest, unit, positions, best, places):
    """Fill best and places (heads, q, k) with the best of what stands at positions (heads, q, m), best first."""
    best[:], places[:] = -np.inf, -1
    ages, counts = np.empty(positions.shape[1:], np.int64), np.empty(positions.shape[1], np.int64)
    for h in range(positions.shape[0]):
        counts[:] = 0
        for i in range(positions.shape[1]):
            for position in positions[h, i]:
                if position >= 0:
                    ages[i, counts[i]] = position - oldest
                    counts[i] += 1
        settle(queries[h], keys[h, :stored], oldest % keys.shape[1], unit, (ages, counts), best[h], places[h])
        order(best[h], places[h])
        for i in range(positions.shape[1]):
            for j in range(places.shape[2]):
                places[h, i, j] += oldest if places[h, i, j] >= 0 else 0


@njit(cache=True, nogil=True)
def tighten_all(k, bounds, candidates, sure=True):
    """Drop all candidates that are below their query's final bound."""
    for i in range(candidates[0].shape[0]):
        if candidates[3][i] != HELPLESS:
            tighten(i, k, bounds, candidates, sure)
