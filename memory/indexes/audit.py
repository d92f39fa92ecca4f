"""Is an approximate index good enough? Asked of the memory's own queries, a few at a time, against exact search."""

from __future__ import annotations

import warnings

import numpy as np

from ...backends.errors import ArgumentError, RecallWarning
from ...core.retrieval import retrieve
from .protocol import Ring

ALTERED = "Pass an unaltered state_dict."
EVERY = 16  # searches from one audit to the next, after the first few
ASKED = 32  # queries of a search that are audited, a head
MEMORY = 0.75  # weight of the audits so far when so many are


class Audit:
    """Recall as measured so far, and whether it is time to measure again."""

    def __init__(self, target: float):
        self.target, self.recall, self.searches = target, 1.0, 0
        self.audits, self.warned = 0, False

    def due(self) -> bool:
        """Count a search; True at the first, second, fourth, eighth, and then at every EVERY-th."""
        self.searches += 1
        return self.searches % EVERY == 0 or self.searches in (1, 2, 4, 8)

    def observe(self, found: np.ndarray, exact: np.ndarray) -> None:
        """Take in what an audit found: positions (heads, q, k) by the index, and by exact search."""
        recall, weight = overlap(found, exact), 0.0 if self.audits == 0 else weight_of_past(found.shape[1])
        self.recall = weight * self.recall + (1 - weight) * recall
        self.audits += 1

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
        return np.array([self.recall, self.searches, self.audits, self.warned], np.float64)

    def restore(self, state: np.ndarray | None) -> None:
        """Go on from `state`.

        Raises
        ------
        ArgumentError
            Not four numbers.
        """
        if state is None or state.shape != (4,):
            raise ArgumentError("state", "the four numbers of an audit", repr(state), ALTERED)
        self.recall, self.searches = float(state[0]), int(state[1])
        self.audits, self.warned = int(state[2]), bool(state[3])


def weight_of_past(queries: int) -> float:
    """What the audits so far count beside one of so many queries: a single query is little evidence."""
    return MEMORY ** (queries / ASKED)


def audited(queries: int) -> np.ndarray:
    """Which of so many queries are audited: a few, evenly spread."""
    return np.linspace(0, queries - 1, min(ASKED, queries)).astype(int)


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
