"""The keys of one memory row as codes that stay: searched through bounds, settled on the row's own keys."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from . import machine
from .certify import HELPLESS, best_of, narrow, no_candidates, panels_a_tile, sample, settle, tighten_all
from .code_tile import FEW, MANY, ONE
from .codes import CHUNK, PACKED, centre_of, encode_keys, encode_queries, words_for
from .heap import order
from .panels import aligned
from .retrieval import search_rows
from .ring import Panels
from .scan import kth_largest_rows
from .search import NOTHING, query_blocks, resident
from .threads import in_parallel
from .tile import lanes
from .unit import unit

ROOM = 2048  # for candidates: scoring more of them in full costs as much as scoring all keys
TIRED = 256  # searches for which panels take over, after one that the codes could not help
SIZES = (ONE[1], FEW[1], MANY[1])  # queries of a tile, and ...
SAMPLED = (32, 16, 12)  # ... one tile in so many is looked at beforehand

FEWEST = 1 << 15  # slots from which codes pay: candidates of fewer keys are too large a share of them


def exact_keys(heads: int, d: int, space: str, dtype: np.dtype, slots: int) -> Panels | Codes:
    """The faster of what this CPU has for exact search over the keys of a row with room for so many."""
    coded = dtype == np.float32 and space != "l2" and slots >= FEWEST and machine.multiplies_bytes()
    return Codes(heads, d, space) if coded else Panels(heads, d, space, dtype)


class Codes:
    """Codes of float32 keys (heads, slots, d): one byte a component and 12 a key. The result is exact all the same.

    Where keys are too much alike for codes to tell them apart, panels are made as well, and asked for a while.
    """

    as_stored = True

    def __init__(self, heads: int, d: int, space: str):
        self.d, self.space = d, space
        self.heads = [empty_codes(0, d) for _ in range(heads)]
        self.centres = np.zeros((heads, d), np.float64)
        self.due = 1  # keys from which on the centre is taken anew
        self.tired = 0
        self.panels: Panels | None = None

    @property
    def nbytes(self) -> int:
        codes = sum(array.nbytes for head in self.heads for array in head)
        return codes + (0 if self.panels is None else self.panels.nbytes)

    def grow(self, slots: int) -> None:
        """Make room for slots below `slots`."""
        for h, head in enumerate(self.heads):
            if head[1].size < slots:
                self.heads[h] = empty_codes(slots, self.d)
                for larger, array in zip(self.heads[h], head, strict=True):
                    larger[: array.shape[0]] = array
        if self.panels is not None:
            self.panels.grow(slots)

    def write(self, keys: np.ndarray, scales: None, slot: int) -> None:
        """Put keys (heads, m, d) into the slots from `slot` on."""
        if self.panels is not None:
            self.panels.write(keys, None, slot)
        if self.space == "cosine":
            keys = unit(keys)
        slots = np.arange(slot, slot + keys.shape[1])
        for h, (head, some) in enumerate(zip(self.heads, keys, strict=True)):
            encode_keys(some, slots, self.centres[h], *head)
        self.due -= keys.shape[1]

    def settle_down(self, keys: np.ndarray) -> None:
        """Code keys (heads, stored, d) around their mean, once in a turnover; make or drop panels over them, as the

        searches so far suggest.
        """
        if self.due <= 0:
            self.due = keys.shape[1]
            for h, some in enumerate(keys):
                some = unit(some) if self.space == "cosine" else some
                self.centres[h] = centre_of(some)
                encode_keys(some, np.arange(len(some)), self.centres[h], *self.heads[h])
        if self.tired == 0:
            self.panels = None
        elif self.panels is None:
            panels = Panels(len(self.heads), self.d, self.space, np.dtype(np.float32))
            panels.grow(keys.shape[1])
            panels.write(keys, None, 0)
            self.panels = panels

    def search(self, keys: np.ndarray, queries: np.ndarray, k: int, start: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores and ages (heads, q, k) of the k best of keys (heads, stored, d), a ring whose oldest is at `start`."""
        panels = self.panels
        if panels is not None:
            self.tired = max(self.tired - 1, 0)
            return panels.search(keys, queries, k, start)
        (heads, q, d), stored = queries.shape, keys.shape[1]
        queries = queries.astype(np.float32, copy=False)
        scores, ages = np.full((heads, q, k), -np.inf, np.float32), np.full((heads, q, k), -1, np.int64)
        some = min(k, stored)

        def work(head: int, block: slice) -> int:
            asked = queries[head, block]
            asked = unit(asked) if self.space == "cosine" else np.ascontiguousarray(asked)
            *found, helpless = self.search_head(head, keys[head], asked, some, start)
            scores[head, block, :some], ages[head, block, :some] = found
            return helpless

        blocks = query_blocks(q, heads, resident(d, 1))
        given_up = in_parallel(work, [(head, block) for head in range(heads) for block in blocks] if some else [])
        if 2 * sum(given_up) > heads * q:
            self.tired = TIRED
        return scores, ages

    def search_head(
        self, head: int, keys: np.ndarray, queries: np.ndarray, k: int, start: int
    ) -> tuple[np.ndarray, np.ndarray, int]:
        """Scores and ages (q, k) of the k best of keys (stored, d) for queries (q, d), at unit norm for cosine, and

        how many queries had to be searched without codes.
        """
        q, room = len(queries), min(4 * k + ROOM, len(keys))
        scores, ages = np.empty((q, k), np.float32), np.empty((q, k), np.int64)
        helpless = search_codes(self.heads[head], keys, start, self.space == "cosine", queries, room, scores, ages)
        if helpless.size:
            scores[helpless], ages[helpless] = search_rows(queries[helpless], keys, k, self.space, NOTHING, start)
        return scores, ages, helpless.size


@njit(cache=True, nogil=True)
def search_codes(codes, keys, start, unit, queries, room, scores, ages):
    """Fill scores and ages (q, k), best first, with the best of keys (stored, d), a ring whose oldest is at `start`.

    Returns the queries for which that could not be done: with more candidates than there is `room` for.
    """
    (q, k), stored = scores.shape, keys.shape[0]
    asked, bounds = encoded(queries, SIZES[0] if q <= SIZES[0] else SIZES[1] if q <= SIZES[1] else SIZES[2])
    candidates = no_candidates(q, k, room)
    counts = candidates[3]
    for i in range(q):
        counts[i] = HELPLESS if bounds[i] == np.inf else 0
    sampled(codes, stored, asked, k, bounds[:q])
    for first, last, shift in ((0, start, stored - start), (start, stored, -start)):
        if first < last:
            narrow(codes, first, last, shift, asked, k, bounds, candidates)
    tighten_all(k, bounds, candidates)
    scores[:], ages[:] = -np.inf, -1
    settle(queries, keys, start, unit, (candidates[0], counts), scores, ages)
    order(scores, ages)
    return np.flatnonzero(counts == HELPLESS)


@njit(cache=True, nogil=True)
def encoded(queries, size):
    """What tiles of `size` queries ask with, and the bounds to start from: +inf where there is nothing to ask with."""
    q, d = queries.shape
    groups, count = (q + size - 1) // size, (d + PACKED - 1) // PACKED
    words = np.zeros((groups, count, size * PACKED), np.int8)
    starts = np.zeros((groups * size, (count + CHUNK - 1) // CHUNK), np.int32)
    reach, slip = np.ones(groups * size, np.float32), np.zeros(groups * size, np.float32)
    bounds, ratio = np.full(groups * size, np.float32(np.inf)), np.zeros(groups, np.float32)
    encode_queries(queries, size, words, starts, reach, slip)
    for i in range(q):
        if slip[i] < np.inf:
            bounds[i], ratio[i // size] = -np.inf, max(ratio[i // size], slip[i])
    return (words, starts, reach, ratio), bounds


@njit(cache=True, nogil=True)
def sampled(codes, stored, asked, k, bounds):
    """Raise the bounds (q,) that are not infinite to what k keys are sure to exceed, as scan_ring does."""
    queries = asked[0].shape[2] // PACKED
    step = SAMPLED[0] if queries == SIZES[0] else SAMPLED[1] if queries == SIZES[1] else SAMPLED[2]
    span = panels_a_tile(queries) * codes[1].shape[1]
    buckets = (4 * k + span - 1) // span * span
    if stored >= step * buckets:
        maxima, lows = np.empty((asked[2].shape[0], buckets), np.float32), np.empty(bounds.shape[0], np.float32)
        sample(codes, stored, step, asked, maxima)
        kth_largest_rows(maxima[: bounds.shape[0]], k, lows)
        for i in range(bounds.shape[0]):
            bounds[i] = max(bounds[i], np.nextafter(lows[i], np.float32(-np.inf)))


def empty_codes(slots: int, d: int) -> tuple[np.ndarray, ...]:
    """Room for the codes of so many keys: codes (panels, words, lanes x 4), scale, error and size (panels, lanes)."""
    wide = lanes(np.float32)
    count = -(-slots // (wide * ONE[0])) * ONE[0]
    codes = aligned((count, words_for(d), wide * PACKED), np.uint8)
    return codes, *(aligned((count, wide), np.float32) for _ in range(3))


def rescore(
    queries: np.ndarray, keys: np.ndarray, positions: np.ndarray, k: int, space: str, stored: int, oldest: int
) -> tuple[np.ndarray, np.ndarray] | Any:
    """Scores and positions (heads, q, k) of the best of the tokens at positions (heads, q, m), -1 for none.

    The keys (heads, slots, d) are a row's, of whose history it holds `stored` tokens, the first at position `oldest`;
    queries (heads, q, d) come at norm 1 for cosine.
    """
    if queries.dtype != np.float32 or keys.dtype != np.float32 or space == "l2":
        return NotImplemented
    shape = *positions.shape[:2], k
    scores, found = np.empty(shape, np.float32), np.empty(shape, np.int64)
    best_of(np.ascontiguousarray(queries), keys, stored, oldest, space == "cosine", positions, scores, found)
    return scores, found
