"""The keys of one memory row as panels that stay: written slot by slot, searched as they are."""

from __future__ import annotations

import numpy as np

from . import machine
from .panels import empty_panels, place
from .search import NO_SCALES, Search, query_blocks
from .threads import in_parallel
from .unit import unit


class Panels:
    """Panels of keys (heads, slots, d), computed with in `dtype` at least float32; float16 stays float16 in memory."""

    def __init__(self, heads: int, d: int, space: str, dtype: np.dtype):
        self.d, self.space = d, space
        self.computing = np.promote_types(dtype, np.float32)
        halves = dtype == np.float16 and space != "cosine" and machine.converts_half()
        self.stored = np.dtype(np.int16) if halves else self.computing
        self.heads = [empty_panels(0, d, self.stored, self.computing) for _ in range(heads)]

    @property
    def nbytes(self) -> int:
        return sum(panels.nbytes for panels in self.heads)

    def grow(self, slots: int) -> None:
        """Make room for slots below `slots`."""
        for h, panels in enumerate(self.heads):
            if panels.shape[0] * panels.shape[2] < slots:
                self.heads[h] = empty_panels(slots, self.d, self.stored, self.computing)
                self.heads[h][: panels.shape[0]] = panels

    def write(self, keys: np.ndarray, slot: int) -> None:
        """Put keys (heads, m, d) into the slots from `slot` on."""
        if self.space == "cosine":
            keys = unit(keys.astype(self.computing, copy=False))
        keys = keys.view(np.int16) if self.stored == np.int16 else keys.astype(self.computing, copy=False)
        for panels, head in zip(self.heads, keys, strict=True):
            place(head, slot, panels)

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
            search = Search(unit(asked) if self.space == "cosine" else asked, some, self.space)
            search.sample(self.heads[head], NO_SCALES, stored)
            search.visit(self.heads[head], NO_SCALES, 0, start, stored - start)
            search.visit(self.heads[head], NO_SCALES, start, stored, -start)
            scores[head, block, :some], ages[head, block, :some] = search.result()

        blocks = query_blocks(q, d, self.computing.itemsize, heads)
        in_parallel(work, [(head, block) for head in range(heads) for block in blocks] if some else [])
        return scores, ages
