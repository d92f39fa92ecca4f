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
from .scan import below
from .search import NOTHING
from .tile import highest_bit, lanes

FEWER = 384  # candidates that there is room for, beside 4 k, where bounds are drawn closer
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
        queries = np.ascontiguousarray(queries)
        q, words, chains = len(queries), self.codes[0].shape[1], self.chains
        asked = (
            np.zeros((q, words, PACKED), np.int8),
            np.zeros((q, -(-words // CHUNK)), np.int32),
            *np.ones((2, q), np.float32),
        )
        encode_queries(queries, 1, *asked)
        if not sure:
            asked[2][:] *= min(LIKELY / math.sqrt(self.d), 1.0)  # the reach of the bounds
        candidates = no_candidates(q, k, min(4 * k + (ROOM if sure else FEWER), len(keys)))
        counts = candidates[3]
        counts[asked[3] == np.inf] = HELPLESS
        bounds = np.where(counts == HELPLESS, np.inf, -np.inf).astype(np.float32)
        scores, ages = np.full((q, k), -np.inf, np.float32), np.full((q, k), NONE, np.int64)
        for some in (probes[:, :1], probes[:, 1:5], probes[:, 5:]):  # from the first lists, bounds for the others
            if some.size:
                who = by_list(some, len(chains.ends), (ONE, FEW, MANY))
                pages = (chains.ends, chains.positions, chains.links)
                narrow_lists(self.codes, asked, *who, *pages, oldest, k, bounds, candidates, sure)
                tighten_all(k, bounds, candidates, sure)
        settle(queries, keys, start, self.space == "cosine", (candidates[0], counts), scores, ages)
        order(scores, ages)
        helpless = np.flatnonzero(counts == HELPLESS)
        if helpless.size:
            width = min(k, len(keys))
            found = search_rows(queries[helpless], keys, width, self.space, NOTHING, start)
            scores[helpless, :width], ages[helpless, :width] = found
        return scores, np.where(ages >= 0, ages + oldest, NONE)


@njit(cache=True, nogil=True)
def narrow_lists(keys, asked, asking, begins, size, chain_ends, positions, links, oldest, k, bounds, candidates, sure):
    """Collect candidates from every list for the queries that probe it, asking[begins[l] : begins[l + 1]]."""
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
