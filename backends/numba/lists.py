"""Inverted lists of one head's keys, in full precision: pages of panels."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from .chains import NONE, Chains, just_below
from .heap import offer, order
from .panels import aligned, place
from .scan import NO_SCALES, below, panels_a_tile, score
from .search import query_blocks
from .threads import in_parallel
from .tile import FEW, MANY, ONE, highest_bit, lanes

SIZES = (ONE[1], FEW[1], MANY[1])


class Lists:
    """Keys (·, d) in `count` lists, computed with in `computing`. For "cosine", keys and queries come at unit norm."""

    def __init__(self, count: int, d: int, space: str, computing: np.dtype):
        self.l2, self.computing = space == "l2", computing
        self.chains = Chains(count, ONE[0] * lanes(computing))  # a page is as many panels as the widest tile takes
        self.panels = aligned((0, d, lanes(computing)), computing)

    @property
    def nbytes(self) -> int:
        return self.panels.nbytes + self.chains.nbytes

    def write(self, keys: np.ndarray, first: int, labels: np.ndarray) -> None:
        """Append keys (m, d), at positions from `first` on, to the lists `labels` (m,) names."""
        self.chains.reserve(len(keys))
        if len(self.panels) < self.chains.pages * ONE[0]:
            panels = aligned((self.chains.pages * ONE[0], *self.panels.shape[1:]), self.computing)
            panels[: len(self.panels)] = self.panels
            self.panels = panels
        scatter(keys.astype(self.computing, copy=False), self.chains.append(first, labels), self.panels)

    def forget(self, oldest: int) -> None:
        """Free the pages whose keys are all at positions before `oldest`."""
        self.chains.forget(oldest)

    def search(
        self, queries: np.ndarray, k: int, probes: np.ndarray, keys: np.ndarray, start: int, oldest: int, sure: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores and positions (q, k) of the best keys, at positions from `oldest` on, of the lists probes (q, p).

        The first list of every query is searched before all others, so that these need not start from nothing. The
        row's own `keys` (stored, d), a ring whose oldest is at `start`, are not needed here, and nothing is unsure.
        """
        q = queries.shape[0]
        best, places = np.full((q, k), -np.inf, self.computing), np.full((q, k), NONE, np.int64)
        chains = self.chains
        for some in (probes[:, :1], probes[:, 1:]):
            if some.size:
                asking, starts, size = by_list(some, len(chains.ends), SIZES)
                pages = (chains.ends, self.panels, chains.positions, chains.links)
                scan_lists(queries, asking, starts, size, *pages, oldest, best, places, self.l2)
        order(best, places)
        return best, places


def search_all(
    heads: list[Any],
    queries: np.ndarray,
    k: int,
    probes: np.ndarray,
    keys: np.ndarray,
    start: int,
    oldest: int,
    sure: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Scores and positions (heads, q, k) of every head's queries (heads, q, d), several heads or blocks at once."""
    shape = *queries.shape[:2], k
    scores, positions = np.empty(shape, queries.dtype), np.empty(shape, np.int64)

    def work(h: int, block: slice) -> None:
        found = heads[h].search(queries[h, block], k, probes[h, block], keys[h], start, oldest, sure)
        scores[h, block], positions[h, block] = found

    blocks = query_blocks(queries.shape[1], len(heads))
    in_parallel(work, [(h, block) for h in range(len(heads)) for block in blocks])
    return scores, positions


@njit(cache=True, nogil=True)
def by_list(probes, count, sizes):
    """The queries of probes (q, p) in the order of the `count` lists they ask, where each list's begin, and the least

    of `sizes` that holds the queries of any list, or the last.
    """
    begins, asking = np.zeros(count + 2, np.int64), np.empty(probes.size, np.int64)
    for i in range(probes.shape[0]):
        for j in range(probes.shape[1]):
            begins[probes[i, j] + 2] += 1
    most, size = begins.max(), sizes[-1]
    for other in sizes[::-1]:
        size = other if most <= other else size
    begins = np.cumsum(begins)
    for i in range(probes.shape[0]):
        for j in range(probes.shape[1]):
            asking[begins[probes[i, j] + 1]] = i
            begins[probes[i, j] + 1] += 1
    return asking, begins[:-1], size


@njit(cache=True, nogil=True)
def scatter(keys, slots, panels):
    """Put keys (m, d) into the panels at `slots` (m,)."""
    for i in range(keys.shape[0]):
        place(keys[i : i + 1], slots[i], panels)


@njit(cache=True, nogil=True)
def scan_lists(queries, asking, starts, size, ends, panels, positions, links, oldest, best, places, l2):
    """Every list against the queries that probe it, asking[starts[l] : starts[l + 1]], in groups of `size`."""
    d, wide = queries.shape[1], panels_a_tile(size)
    span, keys_a_page = wide * panels.shape[2], positions.shape[1]
    scores, hits = np.empty(size * span, queries.dtype), np.empty(size, np.int64)
    for owner in range(ends.shape[0]):
        count = starts[owner + 1] - starts[owner]
        if count == 0 or ends[owner, 1] == NONE:
            continue
        who, groups = asking[starts[owner] : starts[owner + 1]], (count + size - 1) // size
        grouped = np.zeros((groups, d, size), queries.dtype)
        bounds = np.full(groups * size, np.inf, queries.dtype)
        for i in range(count):
            grouped[i // size, :, i % size] = queries[who[i]]
            bounds[i] = just_below(best[who[i], 0])
        page = ends[owner, 1]
        while page != NONE:
            for part in range(keys_a_page // span - 1, -1, -1):
                group = -1
                while True:
                    panel = (page * keys_a_page + part * span) // panels.shape[2]
                    group = score(panels, NO_SCALES, panel, grouped, group + 1, bounds, scores, hits, l2)
                    if group == groups:
                        break
                    for j in range(size):
                        word = hits[j]
                        while word != 0:
                            lane = highest_bit(word)
                            word &= below(lane)
                            position, i = positions[page, part * span + lane], group * size + j
                            if position >= oldest and scores[j * span + lane] > bounds[i]:
                                offer(scores[j * span + lane], position, best[who[i]], places[who[i]])
                                bounds[i] = just_below(best[who[i], 0])
            page = links[page, 0]
