"""Inverted lists of one head's float32 keys as codes: pages of 64 keys, about a byte a component.

The codes bound every score (codes.py); what may be among the k best is scored in full from the row's own keys. Where
all lists are searched the result is the exact one. Where some are left out a neighbour may be missed anyway, and bounds
are drawn closer, to LIKELY standard deviations of a score's error: the bound of Cauchy-Schwarz is sqrt(d) of them.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from . import machine
from .certify import HELPLESS, ends, keep, no_candidates, panels_a_tile, settle, tighten, tighten_all
from .chains import NONE, Chains, just_below
from .code_tile import FEW, MANY, ONE
from .coded import ROOM, empty_codes
from .codes import CHUNK, PACKED, centre_of, encode_keys, encode_queries
from .heap import order
from .lists import Lists, by_list
from .retrieval import search_rows
from .scan import below, kth_largest
from .search import NOTHING
from .tile import highest_bit, lanes

FEWER = 384  # candidates that there is room for, beside 4 k, where bounds are drawn closer
SIZES = (ONE[1], FEW[1], MANY[1])
LIKELY = 2.0  # on either side of a score; the errors of the two that are compared add up to sqrt(2) of one


def make_lists(count: int, d: int, space: str, stored: np.dtype) -> Lists | CodedLists:
    """Lists for keys that the row stores as `stored`: as codes where that can be, in full precision elsewhere."""
    if stored == np.float32 and space != "l2" and machine.multiplies_bytes():
        return CodedLists(count, d, space)
    return Lists(count, d, space, np.dtype(np.float64 if stored == np.float64 else np.float32))


class CodedLists:
    """Keys (·, d) in `count` lists. Bytes a key: d + 12 for the code, 8 for its position."""

    def __init__(self, count: int, d: int, space: str):
        self.d, self.space = d, space
        self.chains = Chains(count, ONE[0] * lanes(np.float32))
        self.codes, self.centre = empty_codes(0, d), np.zeros(d)

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.codes) + self.chains.nbytes

    def write(self, keys: np.ndarray, first: int, labels: np.ndarray) -> None:
        """Append keys (m, d), at positions from `first` on, to the lists `labels` (m,) names."""
        chains = self.chains
        if chains.pages == 0:
            self.centre = centre_of(keys)  # as a rule of all that is stored
        chains.reserve(len(keys))
        if self.codes[1].size < chains.pages * chains.size:
            larger = empty_codes(chains.pages * chains.size, self.d)
            for new, old in zip(larger, self.codes, strict=True):
                new[: len(old)] = old
            self.codes = larger
        encode_keys(keys, chains.append(first, labels), self.centre, *self.codes)

    def forget(self, oldest: int) -> None:
        """Free the pages whose keys are all at positions before `oldest`."""
        self.chains.forget(oldest)

    def search(
        self, queries: np.ndarray, k: int, probes: np.ndarray, keys: np.ndarray, start: int, oldest: int, sure: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores and positions (q, k) of the best of the row's keys (stored, d), a ring whose oldest is at `start` and

        at position `oldest`, that are in the lists probes (q, p): all but surely, or if `sure`, surely. A query whose
        candidates the codes cannot tell apart is searched exactly.
        """
        queries, chains, stored = np.ascontiguousarray(queries), self.chains, len(keys)
        room = min(4 * k + (ROOM if sure else FEWER), stored)
        reach = 1.0 if sure else min(LIKELY / math.sqrt(self.d), 1.0)
        scores, ages = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
        pages = (chains.ends, chains.positions, chains.links)
        row = (keys, start, oldest, self.space == "cosine")
        helpless = search_pages(self.codes, pages, row, queries, probes, room, reach, sure, scores, ages)
        if helpless.size:
            width = min(k, stored)
            found = search_rows(queries[helpless], keys, width, self.space, NOTHING, start)
            scores[helpless, :width], ages[helpless, :width] = found[0], found[1] + oldest
        return scores, ages


@njit(cache=True, nogil=True)
def search_pages(codes, pages, row, queries, probes, room, reach, sure, scores, found):
    """Fill scores and found (q, k), best first, with the positions of the best keys of the lists probes (q, p).

    Returns the queries for which that could not be done. `reach` is the share of their bounds that is drawn.
    """
    keys, start, oldest, unit = row
    chain_ends, positions, links = pages
    (q, k), words = scores.shape, codes[0].shape[1]
    asked = (
        np.zeros((q, words, PACKED), np.int8),
        np.zeros((q, (words + CHUNK - 1) // CHUNK), np.int32),
        np.ones(q, np.float32),
        np.ones(q, np.float32),
    )
    encode_queries(queries, 1, *asked)
    asked[2][:] *= np.float32(reach)
    candidates = no_candidates(q, k, room)
    counts, bounds = candidates[3], np.full(q, -np.inf, np.float32)
    for i in range(q):
        if asked[3][i] == np.inf:
            counts[i], bounds[i] = HELPLESS, np.inf
    first = 0
    for last in (1, 5, probes.shape[1]):  # from the first lists, bounds for the others
        if first < min(last, probes.shape[1]):
            asking, begins, size = by_list(probes[:, first:last], chain_ends.shape[0], SIZES)
            who = (asking, begins, size)
            narrow_lists(codes, asked, *who, chain_ends, positions, links, oldest, k, bounds, candidates, sure)
            tighten_all(k, bounds, candidates, sure)
        first = last
    scores[:], found[:] = -np.inf, NONE
    settle(queries, keys, start, unit, (candidates[0], counts), scores, found)
    order(scores, found)
    for i in range(q):
        for j in range(k):
            found[i, j] = found[i, j] + oldest if found[i, j] >= 0 else NONE
    return np.flatnonzero(counts == HELPLESS)


@njit(cache=True, nogil=True)
def narrow_lists(keys, asked, asking, begins, size, chain_ends, positions, links, oldest, k, bounds, candidates, sure):
    """Collect candidates from every list for the queries that probe it, asking[begins[l] : begins[l + 1]].

    Where they have no bounds yet, the list is looked through beforehand: what k of its keys are sure to reach spares
    most of the others from being candidates.
    """
    words, starts, reach, slip = asked
    places, lows, highs, counts, marks = candidates
    wide, keys_a_page = panels_a_tile(size), positions.shape[1]
    span = wide * keys[1].shape[1]
    low, high = np.empty(size * span, np.float32), np.empty(size * span, np.float32)
    hits = np.empty(size, np.int64)
    for owner in range(chain_ends.shape[0]):
        count = begins[owner + 1] - begins[owner]
        if count == 0 or chain_ends[owner, 1] == NONE:
            continue
        who, groups = asking[begins[owner] : begins[owner + 1]], (count + size - 1) // size
        some = np.zeros((groups, words.shape[1], size * PACKED), np.int8)
        some_starts = np.zeros((groups * size, starts.shape[1]), np.int32)
        some_reach, ratio = np.ones(groups * size, np.float32), np.zeros(groups, np.float32)
        own_bounds = np.full(groups * size, np.inf, np.float32)
        for i in range(count):
            for w in range(words.shape[1]):
                for b in range(PACKED):
                    some[i // size, w, i % size * PACKED + b] = words[who[i], w, b]
            some_starts[i], some_reach[i] = starts[who[i]], reach[who[i]]
            if counts[who[i]] != HELPLESS:
                own_bounds[i] = just_below(bounds[who[i]])
                ratio[i // size] = max(ratio[i // size], slip[who[i]])
        group_asked = (some, some_starts, some_reach, ratio)
        page = chain_ends[owner, 1]
        sets, slots, other = (4 * k + span - 1) // span * span, 0, page
        while other != NONE and slots < sets:
            slots, other = slots + keys_a_page, links[other, 0]
        if slots >= sets and own_bounds.min() == -np.inf:
            maxima = np.full((groups * size, sets), np.float32(-np.inf))
            list_maxima(keys, page, group_asked, positions, links, oldest, low, high, hits, maxima)
            for i in range(count):
                if own_bounds[i] == -np.inf:
                    bounds[who[i]] = kth_largest(maxima[i], k)
                    own_bounds[i] = just_below(bounds[who[i]])
        while page != NONE:
            for part in range(keys_a_page // span - 1, -1, -1):
                group, panel = -1, (page * keys_a_page + part * span) // keys[1].shape[1]
                while True:
                    group = ends(keys, panel, group_asked, group + 1, own_bounds, low, high, hits)
                    if group == groups:
                        break
                    for j in range(size):
                        i, word = group * size + j, hits[j]
                        while word != 0:
                            lane = highest_bit(word)
                            word &= below(lane)
                            position, at = positions[page, part * span + lane], j * span + lane
                            if position >= oldest and high[at] > own_bounds[i]:
                                query = who[i]
                                if counts[query] == marks[query]:
                                    tighten(query, k, bounds, candidates, sure)
                                    own_bounds[i] = just_below(bounds[query])
                                if counts[query] != HELPLESS:
                                    keep(query, position - oldest, low[at], high[at], places, lows, highs, counts)
            page = links[page, 0]


@njit(cache=True, nogil=True)
def list_maxima(keys, page, asked, positions, links, oldest, low, high, hits, maxima):
    """Fill maxima (queries, m) with the largest lower ends of disjoint sets of the living keys of a list."""
    size = hits.shape[0]
    span, column = low.shape[0] // size, 0
    everything, alive = np.full(maxima.shape[0], np.float32(-np.inf)), np.empty(span, np.bool_)
    while page != NONE:
        for part in range(positions.shape[1] // span):
            for lane in range(span):
                alive[lane] = positions[page, part * span + lane] >= oldest
            panel = (page * positions.shape[1] + part * span) // keys[1].shape[1]
            for group in range(maxima.shape[0] // size):
                ends(keys, panel, asked, group, everything, low, high, hits)
                for j in range(size):
                    into = maxima[group * size + j, column : column + span]
                    for lane in range(span):
                        if alive[lane]:
                            into[lane] = max(into[lane], low[j * span + lane])
            column = (column + span) % maxima.shape[1]
        page = links[page, 0]
