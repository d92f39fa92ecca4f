"""Is an approximate index good enough? Asked of the memory's own queries, a few at a time, against exact search."""

from __future__ import annotations

import math
import warnings

import numpy as np

from ...backends.errors import ArgumentError, RecallWarning
from ...core.retrieval import retrieve
from .protocol import Ring

ALTERED = "Pass an unaltered state_dict."
ALL, EARLY, MOVED = 64, 4096, 2048  # queries that are all audited, and those, more of them in every turnover,
OFTEN, SELDOM = 8, 256  # of which one in so many is, and of all others
ASKED, MOST = 32, 128  # queries of a search that are audited at once, a head: if there are so many, and at most
NONE = np.empty(0, int)
MEMORY = 0.93  # weight of the audits so far when ASKED more are
STALE = 1.0  # turnovers in which what audits have found keeps 1/e of its weight


class Audit:
    """Recall as measured so far, and whether it is time to measure again."""

    def __init__(self, target: float):
        self.target, self.recall, self.warned = target, 1.0, False
        self.restart()

    def restart(self) -> None:
        """What was measured so far was about another setting: begin again."""
        self.queries = self.audited = 0
        self.begun = self.last = math.nan  # turnovers of the row then, and at the last audit

    def due(self, queries: int, turnovers: float) -> np.ndarray:
        """Count the queries of a search, and say which of them are to be audited: evenly spread ones, or none.

        `turnovers` is how often all that the row holds has been replaced: what audits have found is about keys, and
        as a rule queries, that have left since.
        """
        self.queries += queries
        self.begun = turnovers if math.isnan(self.begun) else self.begun
        often = min(self.queries, EARLY + int(MOVED * (turnovers - self.begun)))
        owed = min(self.queries, ALL + often // OFTEN + self.queries // SELDOM) - self.audited
        some = min(owed, queries, MOST)
        if some <= 0 or some < min(queries, ASKED):
            return NONE
        self.audited += some
        return np.linspace(0, queries - 1, some).astype(int)

    def trust(self, turnovers: float) -> float:
        """What the audits so far still count, now that there is another one."""
        moved = 0.0 if math.isnan(self.last) else max(turnovers - self.last, 0.0)
        self.last = turnovers
        return math.exp(-moved / STALE)

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
        return np.array([self.recall, self.queries, self.audited, self.warned, self.begun, self.last], np.float64)

    def restore(self, state: np.ndarray | None) -> None:
        """Go on from `state`.

        Raises
        ------
        ArgumentError
            Not six numbers.
        """
        if state is not None and state.shape == (4,):  # an older one
            state = np.append(state, [math.nan, math.nan])
        if state is None or state.shape != (6,):
            raise ArgumentError("state", "the six numbers of an audit", repr(state), ALTERED)
        self.recall, self.queries = float(state[0]), int(state[1])
        self.audited, self.warned = int(state[2]), bool(state[3])
        self.begun, self.last = (float(x) if math.isfinite(x) else math.nan for x in state[4:])


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
