"""Is an approximate index good enough? Asked of the memory's own queries, a few at a time, against exact search."""

from __future__ import annotations

import warnings

import numpy as np

from ...backends.errors import ArgumentError, RecallWarning
from ...core.retrieval import retrieve
from .protocol import Ring

ALTERED = "Pass an unaltered state_dict."
ALL, EARLY = 64, 4096  # queries that are all audited, and those
OFTEN, SELDOM = 8, 256  # of which one in so many is, and of the later ones
ASKED, MOST = 32, 128  # queries of a search that are audited at once, a head: if there are so many, and at most
MEMORY = 0.93  # weight of the audits so far when ASKED more are


class Audit:
    """Recall as measured so far, and whether it is time to measure again."""

    def __init__(self, target: float):
        self.target, self.recall, self.warned = target, 1.0, False
        self.restart()

    def restart(self) -> None:
        """What was measured so far was about another setting: begin again."""
        self.queries = self.audited = 0

    def due(self, queries: int) -> np.ndarray:
        """Count the queries of a search, and say which of them are to be audited: evenly spread ones, or none."""
        self.queries += queries
        owed = min(self.queries, ALL + min(self.queries, EARLY) // OFTEN + self.queries // SELDOM) - self.audited
        some = min(owed, queries, MOST)
        if some <= 0 or some < min(queries, ASKED):
            return np.empty(0, int)
        self.audited += some
        return np.linspace(0, queries - 1, some).astype(int)

    def observe(self, found: np.ndarray, exact: np.ndarray) -> None:
        """Take in what an audit found: positions (heads, q, k) by the index, and by exact search."""
        q = found.shape[1]
        weight = 0.0 if self.audited == q else weight_of_past(q)
        self.recall = weight * self.recall + (1 - weight) * overlap(found, exact)

    def warn(self, index: str, remedy: str) -> None:
        """Warn, once, that the target is missed."""
        if not self.warned:
            self.warned = True
            warnings.warn(
                f"{index} finds {self.recall:.2f} of the nearest keys of this memory's own queries, less than "
                f"target_recall={self.target}. {remedy}",
                RecallWarning,
                stacklevel=6,
            )

    def state(self) -> np.ndarray:
        return np.array([self.recall, self.queries, self.audited, self.warned], np.float64)

    def restore(self, state: np.ndarray | None) -> None:
        """Go on from `state`.

        Raises
        ------
        ArgumentError
            Not four numbers.
        """
        if state is None or state.shape != (4,):
            raise ArgumentError("state", "the four numbers of an audit", repr(state), ALTERED)
        self.recall, self.queries = float(state[0]), int(state[1])
        self.audited, self.warned = int(state[2]), bool(state[3])


def weight_of_past(queries: int) -> float:
    """What the audits so far count beside one of so many queries: a single query is little evidence."""
    return MEMORY ** (queries / ASKED)


def exact_positions(row: Ring, queries: np.ndarray, k: int, space: str) -> np.ndarray:
    """Positions (heads, q, k) in the whole history that exact search finds."""
    keys = row.numbers("keys", (slice(None), slice(0, row.stored)))
    _, ages = retrieve(queries, keys, k, space, None, row.start)
    return np.where(ages >= 0, ages + row.oldest, -1)


def overlap(found: np.ndarray, exact: np.ndarray) -> float:
    """Share of the positions `exact` (..., k) that are among `found` (..., k)."""
    wanted = exact >= 0
    if not wanted.any():
        return 1.0
    hit = (exact[..., :, None] == found[..., None, :]).any(axis=-1)
    return float((hit & wanted).sum() / wanted.sum())
