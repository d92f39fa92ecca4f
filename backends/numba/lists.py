"""Inverted lists of one head's keys: pages of panels in the order of age, so that the oldest leave by the page.

A page is as many panels as the widest tile takes. Each list is a chain of pages, doubly linked: searched from the
newest page, freed from the oldest. A page that still holds one living key is kept; what else is in it is skipped.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from .heap import offer, order
from .panels import aligned, place
from .scan import below, panels_a_tile, score
from .search import NO_SCALES
from .threads import in_parallel
from .tile import FEW, MANY, ONE, highest_bit, lanes

NONE = -1  # no page, no position


class Lists:
    """Keys (·, d) in `count` lists, computed with in `computing`."""

    def __init__(self, count: int, d: int, space: str, computing: np.dtype):
        self.d, self.l2, self.computing = d, space == "l2", computing
        self.size = ONE[0] * lanes(computing)  # keys a page holds
        self.ends = np.full((count, 2), NONE, np.int64)  # the oldest and the newest page of every list
        self.filled = np.zeros(count, np.int64)  # keys in the newest page
        self.panels = aligned((0, d, lanes(computing)), computing)
        self.positions = np.empty((0, self.size), np.int64)  # of every key of every page
        self.links = np.empty((0, 2), np.int64)  # of every page, the next older and the next newer
        self.free = np.empty(0, np.int64)

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in (self.ends, self.filled, self.panels, self.positions, self.links, self.free))

    def write(self, keys: np.ndarray, first: int, labels: np.ndarray) -> None:
        """Append keys (m, d), at positions from `first` on, to the lists `labels` (m,) names."""
        self._reserve(min(len(keys), len(keys) // self.size + len(self.ends) + 1))
        keys = keys.astype(self.computing, copy=False)
        used = append(keys, first, labels, self.ends, self.filled, self.panels, self.positions, self.links, self.free)
        self.free = self.free[: len(self.free) - used]

    def _reserve(self, pages: int) -> None:
        if len(self.free) >= pages:
            return
        had = len(self.links)
        more = max(pages - len(self.free), had // 2)
        panels = aligned(((had + more) * ONE[0], *self.panels.shape[1:]), self.computing)
        panels[: len(self.panels)] = self.panels
        self.panels = panels
        self.positions = np.concatenate([self.positions, np.full((more, self.size), NONE, np.int64)])
        self.links = np.concatenate([self.links, np.full((more, 2), NONE, np.int64)])
        self.free = np.concatenate([np.arange(had + more - 1, had - 1, -1), self.free])

    def forget(self, oldest: int) -> None:
        """Free the pages whose keys are all at positions before `oldest`."""
        freed = np.empty(len(self.links), np.int64)
        count = free_pages(oldest, self.ends, self.positions, self.links, freed)
        if count:
            self.free = np.concatenate([self.free, freed[:count]])

    def search(self, queries: np.ndarray, k: int, probes: np.ndarray, oldest: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores and positions (q, k) of the best keys, at positions from `oldest` on, of the lists probes (q, p).

        The first list of every query is searched before all others, so that these need not start from nothing.
        """
        q = queries.shape[0]
        best, places = np.full((q, k), -np.inf, self.computing), np.full((q, k), NONE, np.int64)
        for some in (probes[:, :1], probes[:, 1:]):
            if some.size:
                self._visit(queries, some, oldest, best, places)
        order(best, places)
        return best, places

    @staticmethod
    def search_all(
        heads: list[Lists], queries: np.ndarray, k: int, probes: np.ndarray, oldest: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores and positions (heads, q, k) of every head's queries (heads, q, d), several heads at once."""
        tasks = [(made, queries[h], probes[h]) for h, made in enumerate(heads)]
        found = in_parallel(lambda made, asked, lists: made.search(asked, k, lists, oldest), tasks)
        scores, positions = (np.stack(parts) for parts in zip(*found, strict=True))
        return scores, positions

    def _visit(
        self, queries: np.ndarray, probes: np.ndarray, oldest: int, best: np.ndarray, places: np.ndarray
    ) -> None:
        asking = np.argsort(probes, axis=None, kind="stable")  # pairs of list and query, by list
        starts = np.searchsorted(probes.ravel()[asking], np.arange(len(self.ends) + 1))
        most = int(np.diff(starts).max(initial=1))
        size = next((size for _, size in (ONE, FEW) if most <= size), MANY[1])
        pages = (self.ends, self.panels, self.positions, self.links)
        scan_lists(queries, asking // probes.shape[1], starts, size, *pages, oldest, best, places, self.l2)


@njit(cache=True, nogil=True)
def append(keys, first, labels, ends, filled, panels, positions, links, free):
    """Put every key into the newest page of its list; returns how many pages were taken from the end of `free`."""
    size, used = positions.shape[1], 0
    for i in range(keys.shape[0]):
        owner = labels[i]
        page = ends[owner, 1]
        if page == NONE or filled[owner] == size:
            used += 1
            taken = free[free.shape[0] - used]
            positions[taken] = NONE
            links[taken, 0], links[taken, 1] = page, NONE
            if page == NONE:
                ends[owner, 0] = taken
            else:
                links[page, 1] = taken
            ends[owner, 1], filled[owner], page = taken, 0, taken
        place(keys[i : i + 1], page * size + filled[owner], panels)
        positions[page, filled[owner]] = first + i
        filled[owner] += 1
    return used


@njit(cache=True, nogil=True)
def free_pages(oldest, ends, positions, links, freed):
    """Unlink the pages without a living key; returns how many, listed in `freed`."""
    count = 0
    for owner in range(ends.shape[0]):
        page = ends[owner, 0]
        while page != NONE and positions[page].max() < oldest:
            freed[count], count = page, count + 1
            page = links[page, 1]
        ends[owner, 0] = page
        if page == NONE:
            ends[owner, 1] = NONE
        else:
            links[page, 0] = NONE
    return count


@njit(cache=True, nogil=True)
def just_below(score):
    """A little less: lists are not in the order of age, so that keys equal to the worst kept must be looked at."""
    return score - abs(score) * type(score)(2.0**-22) - type(score)(2.0**-126)


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
