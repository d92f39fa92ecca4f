"""The selection of the authors' released code, for comparison with it: the best key of each of k strided buckets."""

from __future__ import annotations

import numpy as np

from ...core.retrieval import bucketed
from .protocol import Ring


class BucketedIndex:
    """Every key is scored, and of every k-th slot of the ring the best one is taken; see `bucketed`."""

    nbytes = 0

    def __init__(self, space: str):
        self.space = space

    def state(self) -> dict[str, np.ndarray]:
        """Nothing: the keys say all."""
        return {}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Nothing to restore."""

    def explain(self) -> str:
        return "the best of every bucket, as in the authors' code"

    def search(self, row: Ring, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        if row.stored == 0:
            shape = (*queries.shape[:2], k)
            return np.full(shape, -np.inf, queries.dtype), np.full(shape, -1, np.int64)
        scores, slots = bucketed(queries, row.numbers("keys", (slice(None), slice(0, row.stored))), k, self.space)
        return scores, np.where(slots >= 0, row.oldest + (slots - row.start) % row.stored, -1)
