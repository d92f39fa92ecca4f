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
ASKED, MOST = 32, 128  # queries that are audited at once, as a rule; of one search at most
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
        self.waiting: list[np.ndarray] = []  # queries (heads, some, dim) that are to be audited with others

    def taken(self, queries: np.ndarray, turnovers: float) -> np.ndarray | None:
        """Count the queries (heads, q, dim) of a search; returns those to audit now, earlier ones with them, or None.

        `turnovers` is how often all that the row holds has been replaced: what audits have found is about keys, and
        as a rule queries, that have left since. But for the first, queries wait until there are ASKED: one by one they
        would cost several times as much.
        """
        q = queries.shape[1]
        self.queries += q
        self.begun = turnovers if math.isnan(self.begun) else self.begun
        often = min(self.queries, EARLY + int(MOVED * (turnovers - self.begun)))
        some = min(min(self.queries, ALL + often // OFTEN + self.queries // SELDOM) - self.audited, q, MOST)
        if some <= 0:
            return None
        self.audited += some
        self.waiting.append(queries[:, np.linspace(0, q - 1, some).astype(int)])
        if self.audited > ALL and sum(asked.shape[1] for asked in self.waiting) < ASKED:
            return None
        asked, self.waiting = np.concatenate(self.waiting, axis=1), []
        return asked

    def explain(self) -> str:
        found = f"recall {self.recall:.3f} of {self.audited} queries audited" if self.audited else "recall not measured"
        return f"{found}, target {self.target}"

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
                stacklevel=7,
            )

    def state(self, heads: int, dim: int) -> dict[str, np.ndarray]:
        """What has been measured, and the queries (heads, some, dim) that wait."""
        numbers = self.recall, self.queries, self.audited, self.warned, self.begun, self.last
        waiting = np.concatenate(self.waiting, axis=1) if self.waiting else np.empty((heads, 0, dim), np.float32)
        return {"audit": np.array(numbers, np.float64), "waiting": waiting}

    def restore(self, state: dict[str, np.ndarray], heads: int, dim: int) -> None:
        """Go on from `state`.

        Raises
        ------
        ArgumentError
            Not six numbers, or not queries of that size.
        """
        numbers, waiting = state.get("audit", np.empty(0)), state.get("waiting", np.empty((heads, 0, dim), np.float32))
        if numbers.shape == (4,):  # an older one
            numbers = np.append(numbers, [math.nan, math.nan])
        if numbers.shape != (6,):
            raise ArgumentError("state", "the six numbers of an audit", repr(numbers), ALTERED)
        fits = waiting.ndim == 3 and waiting.shape[::2] == (heads, dim) and waiting.dtype in (np.float32, np.float64)
        if not fits or not np.isfinite(waiting).all():
            raise ArgumentError("state", f"queries of {heads} heads of {dim}", f"{waiting.shape}", ALTERED)
        self.recall, self.queries = float(numbers[0]), int(numbers[1])
        self.audited, self.warned = int(numbers[2]), bool(numbers[3])
        self.begun, self.last = (float(x) if math.isfinite(x) else math.nan for x in numbers[4:])
        self.waiting = [waiting] if waiting.size else []


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
