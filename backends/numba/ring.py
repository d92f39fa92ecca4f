"""The keys of one memory row as panels that stay: written slot by slot, searched as they are."""

from __future__ import annotations

import numpy as np

from . import machine
from .panels import aligned, empty_panels, grouped, place
from .scan import NO_SCALES, scan_ring
from .search import group_size, query_blocks, resident
from .shortlist import shortlisted, worthwhile
from .threads import in_parallel
from .unit import unit

STORED = {np.float16: np.int16, np.uint16: np.uint16, np.int8: np.int8}  # panels of these are widened in the tile


class Panels:
    """Panels of keys (heads, slots, d) stored as `dtype`: floats, bfloat16 as the bits of uint16, or int8 with scales.

    Narrow keys stay narrow in the panels, but for "cosine", where they are float32 at unit norm.
    """

    def __init__(self, heads: int, d: int, space: str, dtype: np.dtype):
        self.d, self.space = d, space
        self.computing = np.dtype(np.float64 if dtype == np.float64 else np.float32)
        self.as_stored = space != "cosine" and (dtype != np.float16 or machine.converts_half())
        self.stored = np.dtype(STORED.get(dtype.type, dtype) if self.as_stored else self.computing)
        self.heads = [self._empty(0) for _ in range(heads)]

    def _empty(self, slots: int) -> tuple[np.ndarray, np.ndarray]:
        panels = empty_panels(slots, self.d, self.stored, self.computing)
        scaled = self.stored == np.int8
        return panels, aligned((panels.shape[0], panels.shape[2]), np.float32) if scaled else NO_SCALES

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for head in self.heads for array in head)

    def grow(self, slots: int) -> None:
        """Make room for slots below `slots`."""
        for h, head in enumerate(self.heads):
            if head[0].shape[0] * head[0].shape[2] < slots:
                self.heads[h] = self._empty(slots)
                for larger, array in zip(self.heads[h], head, strict=True):
                    larger[: array.shape[0]] = array

    def write(self, keys: np.ndarray, scales: np.ndarray | None, slot: int) -> None:
        """Put keys (heads, m, d), and their scales (heads, m) if they have any, into the slots from `slot` on."""
        if self.space == "cosine":
            keys = unit(keys)
        for h, (panels, steps) in enumerate(self.heads):
            place(keys[h].view(self.stored), slot, panels)
            if scales is not None:
                steps.reshape(-1)[slot : slot + keys.shape[1]] = scales[h]

    def settle_down(self, keys: np.ndarray) -> None:
        """There is nothing to decide."""

    def search(self, keys: np.ndarray, queries: np.ndarray, k: int, start: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores and ages (heads, q, k) of the k best of keys (heads, stored, d), a ring whose oldest is at `start`."""
        (heads, q, d), stored = queries.shape, keys.shape[1]
        queries = queries.astype(self.computing, copy=False)
        scores = np.full((heads, q, k), -np.inf, self.computing)
        ages = np.full((heads, q, k), -1, np.int64)
        some = min(k, stored)

        def work(head: int, block: slice) -> None:
            asked = queries[head, block]
            asked = unit(asked) if self.space == "cosine" else asked
            if worthwhile(len(asked), stored, some):
                found = shortlisted(asked, *self.heads[head], stored, start, some, self.space == "l2")
                scores[head, block, :some], ages[head, block, :some] = found
                return
            best, places = np.empty((len(asked), some), self.computing), np.empty((len(asked), some), np.int64)
            groups = grouped(asked, group_size(len(asked)))
            scan_ring(*self.heads[head], stored, start, groups, best, places, self.space == "l2")
            scores[head, block, :some], ages[head, block, :some] = best, places

        blocks = query_blocks(q, heads, resident(d, self.computing.itemsize))
        in_parallel(work, [(head, block) for head in range(heads) for block in blocks] if some else [])
        return scores, ages
