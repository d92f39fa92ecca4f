"""Which key stands where in inverted lists: pages in the order of age, so that the oldest keys leave by the page.

Each list is a chain of pages, doubly linked: searched from the newest page, freed from the oldest. A page that still
holds one living key is kept; what else is in it is skipped.
"""

from __future__ import annotations

import numpy as np
from numba import njit

NONE = -1  # no page, no position


class Chains:
    """The pages of `count` lists, of `size` keys each; what the pages hold is kept elsewhere, by slot."""

    def __init__(self, count: int, size: int):
        self.size = size
        self.ends = np.full((count, 2), NONE, np.int64)  # the oldest and the newest page of every list
        self.filled = np.zeros(count, np.int64)  # keys in the newest page
        self.positions = np.empty((0, size), np.int64)  # of every key of every page
        self.links = np.empty((0, 2), np.int64)  # of every page, the next older and the next newer
        self.free = np.empty(0, np.int64)

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in (self.ends, self.filled, self.positions, self.links, self.free))

    @property
    def pages(self) -> int:
        """How many there are, free ones included."""
        return len(self.links)

    def reserve(self, keys: int) -> None:
        """Have pages for so many more keys, in whatever lists they belong."""
        needed = min(keys, keys // self.size + len(self.ends) + 1)
        if len(self.free) >= needed:
            return
        had = self.pages
        more = max(needed - len(self.free), had // 2)
        self.positions = np.concatenate([self.positions, np.full((more, self.size), NONE, np.int64)])
        self.links = np.concatenate([self.links, np.full((more, 2), NONE, np.int64)])
        self.free = np.concatenate([np.arange(had + more - 1, had - 1, -1), self.free])

    def append(self, first: int, labels: np.ndarray) -> np.ndarray:
        """Slots (m,) for keys at positions from `first` on, in the lists `labels` (m,) names."""
        slots = np.empty(len(labels), np.int64)
        used = append(first, labels, self.ends, self.filled, self.positions, self.links, self.free, slots)
        self.free = self.free[: len(self.free) - used]
        return slots

    def forget(self, oldest: int) -> None:
        """Free the pages whose keys are all at positions before `oldest`."""
        freed = np.empty(self.pages, np.int64)
        count = free_pages(oldest, self.ends, self.positions, self.links, freed)
        if count:
            self.free = np.concatenate([self.free, freed[:count]])


@njit(cache=True, nogil=True)
def append(first, labels, ends, filled, positions, links, free, slots):
    """Put every key into the newest page of its list; returns how many pages were taken from the end of `free`."""
    size, used = positions.shape[1], 0
    for i in range(labels.shape[0]):
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
        slots[i] = page * size + filled[owner]
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
