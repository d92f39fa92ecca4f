"""Exact top-k without ever holding all scores: blocks of keys become panels that one scan passes over."""

from __future__ import annotations

from typing import Any

import numpy as np

from .flat import flatten
from .panels import empty_panels, place
from .scan import NO_SCALES
from .search import NOTHING, Search, query_blocks, resident
from .threads import in_parallel
from .unit import unit

BLOCK = 4096  # keys made panels at once: with d = 64, 1 MiB


def retrieve(queries: np.ndarray, keys: np.ndarray, k: int, space: str, mask: Any, start: int) -> Any:
    lead, (queries, keys) = flatten(queries, keys)
    (batch, q, d), n = queries.shape, keys.shape[1]
    if d == 0:
        return NotImplemented
    if mask is not None:
        mask = np.broadcast_to(mask, (*lead, q, n)).reshape(batch, q, n)
    scores = np.full((batch, q, k), -np.inf, queries.dtype)
    positions = np.full((batch, q, k), -1, np.int64)
    some = min(k, n)

    def work(b: int, block: slice) -> None:
        allowed = NOTHING if mask is None else np.ascontiguousarray(mask[b, block])
        asked = unit(queries[b, block]) if space == "cosine" else queries[b, block]
        found = search_rows(asked, keys[b], some, space, allowed, start)
        scores[b, block, :some], positions[b, block, :some] = found

    blocks = query_blocks(q, batch, resident(d, queries.itemsize))
    in_parallel(work, [(b, block) for b in range(batch) for block in blocks])
    return scores.reshape(*lead, q, k), positions.reshape(*lead, q, k)


def search_rows(
    queries: np.ndarray, keys: np.ndarray, k: int, space: str, mask: np.ndarray, start: int
) -> tuple[np.ndarray, np.ndarray]:
    """Scores and positions (q, k) of the k best `keys` (n, d), a ring whose oldest stands at `start`.

    For cosine, queries come at unit norm and keys do not.
    """
    n, d = keys.shape
    search = Search(queries, k, space)
    panels = empty_panels(min(n, BLOCK), d, keys.dtype, keys.dtype)
    for low, high, shift in ((0, start, n - start), (start, n, -start)):
        for last in range(high, low, -BLOCK):
            first = max(last - BLOCK, low)
            block = keys[first:last]
            place(unit(block) if space == "cosine" else block, 0, panels)
            search.visit(panels, NO_SCALES, 0, last - first, first + shift, mask)
    return search.result()
